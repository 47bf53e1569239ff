"""What the service knows of the one run in progress, and the blocking steps of preparing it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_harli.errors import HarliError
from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import BatchCursor, RunSpec, ServedLimits, SlotRef, StartRun
from sglang_harli.service import admission, checkpoints
from sglang_harli.service.checkpoints import CheckpointError
from sglang_harli.service.feeder import Feeder
from sglang_harli.service.job_files import JobPaths
from sglang_harli.service.jobs import JobRecord, Wish
from sglang_harli.service.token_store import TokenReader

STEPS_AHEAD = 2  # optimizer steps fed beyond the last one applied


class Phase(enum.Enum):
    PREPARING = "preparing"  # data and checkpoint are being read
    STARTING = "starting"  # StartRun is sent
    TRAINING = "training"
    STOPPING = "stopping"  # a run that the store does not want


@dataclass
class Run:
    """Attributes:
    next_cursor: the next micro-batch to feed.
    applied: the last optimizer step that the scheduler has applied.
    tokens: run through the model up to ``applied``, all attempts of the kept work together.
    asked: the wish of which the scheduler has been told.
    slot: path of the snapshot slot; the scheduler's, or ours between SnapshotReady and SnapshotSaved.
    """

    job: str
    attempt: int
    phase: Phase
    scheduler_pid: int
    feeder: Feeder | None = None
    next_cursor: BatchCursor | None = None
    applied: int = 0
    tokens: int = 0
    asked: Wish = Wish.RUN
    slot: SlotRef | None = None
    restore: shared_memory.Slot | None = None
    told_sub_state: str = ""
    told_at: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def names(self, message: Any) -> bool:
        """Whether a message is about this run and not about an older attempt."""
        return message.job == self.job and message.attempt == self.attempt

    def take_back(self) -> None:
        """Remove what lies in shared memory."""
        if self.slot is not None:
            Path(self.slot.path).unlink(missing_ok=True)
            self.slot = None
        self.drop_restore()

    def drop_restore(self) -> None:
        if self.restore is not None:
            self.restore.unlink()
            self.restore = None


def open_feeder(record: JobRecord, paths: JobPaths, limits: ServedLimits, fingerprint: str) -> Feeder:
    """The job's data, checked against the served model once more.

    Raises:
        HarliError: the job does not fit the model, or its data is not readable.
    """
    admission.check_hyperparameters(record.hyperparameters, limits)
    data = record.data
    admission.check_data(record.hyperparameters, data["longest_row"], data["longest_line"], limits)
    admission.check_vocabulary(data["largest_id"], limits)
    if data["tokenizer"] != fingerprint:
        raise HarliError(
            "the data was tokenized with another tokenizer or chat template than the served model has: submit it again",
            code="other_model",
        )
    try:
        feeder = Feeder(TokenReader(paths.data), record.hyperparameters)
    except (OSError, ValueError, KeyError) as error:
        raise HarliError(f"the job's data cannot be read: {error}", code="bad_data_files") from error
    if feeder.total_steps != record.total_steps:
        raise HarliError(
            f"{paths.data} holds data for {feeder.total_steps} steps, not {record.total_steps}: submit it again",
            code="bad_data_files",
        )
    return feeder


@dataclass
class Restored:
    """A checkpoint in a slot; ``step`` 0 and no slot: the run starts from nothing."""

    step: int = 0
    tokens: int = 0
    slot: shared_memory.Slot | None = None
    ref: SlotRef | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def restore(record: JobRecord, paths: JobPaths, shm: Path) -> Restored:
    """The job's newest checkpoint that is whole (blocking).

    Raises:
        HarliError: it had checkpoints and none can be read, or shared memory is full.
    """
    if record.checkpoint_step == 0:
        return Restored()
    warnings: list[str] = []
    for step in reversed(checkpoints.steps(paths.checkpoints)):
        if step > record.checkpoint_step:  # written, but the store was never told
            continue
        try:
            slot, ref, meta, tokens = checkpoints.load_state(paths.checkpoints, step, shm)
        except CheckpointError as error:
            warnings.append(f"checkpoint of step {step} cannot be used: {error.message}")
            continue
        except OSError as error:
            raise HarliError(
                f"the checkpoint does not fit into shared memory ({error}): make room in /dev/shm",
                code="shared_memory",
            ) from error
        return Restored(step, tokens, slot, ref, meta, warnings)
    raise CheckpointError(
        f"no checkpoint in {paths.checkpoints} can be read ({'; '.join(warnings) or 'the folder is empty'}): "
        "submit the job again"
    )


def start_message(record: JobRecord, restored: Restored) -> StartRun:
    spec = RunSpec(
        job=record.id,
        attempt=record.attempt,
        hyperparameters=record.hyperparameters,
        total_steps=record.total_steps,
    )
    return StartRun(spec=spec, step=restored.step, restore=restored.ref, meta=restored.meta)

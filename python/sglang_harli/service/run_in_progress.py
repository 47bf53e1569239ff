"""The blocking steps of preparing a run: its data, and the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from pathlib import Path
from zipfile import BadZipFile

import msgspec
from safetensors import SafetensorError

from sglang_harli.errors import HarliError
from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import ServedLimits
from sglang_harli.service import admission, checkpoints
from sglang_harli.service.checkpoints import CheckpointError
from sglang_harli.service.feeder import Feeder
from sglang_harli.service.job_files import JobPaths
from sglang_harli.service.jobs import JobRecord
from sglang_harli.service.run_machine_state import Preparation
from sglang_harli.service.token_store import TokenReader

# What files that are not what was written can bring about, whoever reads them.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError),
    *(BadZipFile, zlib.error, SafetensorError, msgspec.MsgspecError),
)


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
    except UNREADABLE as error:
        raise HarliError(f"the job's data cannot be read: {error}", code="bad_data_files") from error
    if feeder.total_steps != record.total_steps:
        raise HarliError(
            f"{paths.data} holds data for {feeder.total_steps} steps, not {record.total_steps}: submit it again",
            code="bad_data_files",
        )
    return feeder


def restore(record: JobRecord, paths: JobPaths, shm: Path) -> Preparation:
    """The job's newest checkpoint that is whole, in a slot; a damaged one is put aside as ``step-N.bad``.

    With none at all the run starts from nothing; ``plan`` is left open.

    Raises:
        CheckpointError: none can be read and the job cannot begin without one (it carries another's adapter).
        HarliError: shared memory is full.
    """
    damage: list[str] = []
    newest = record.checkpoint_step
    found = checkpoints.steps(paths.checkpoints)
    if newest and newest not in found:
        damage.append(f"the checkpoint of step {newest} is missing")
    for step in reversed(found):
        if step > newest or (step == 0 and not record.carried):  # written, but the store was never told
            continue
        try:
            whole = _restore_one(record, paths, shm, step)
        except CheckpointError as error:
            damage.append(f"the checkpoint of step {step} cannot be used ({error.message})")
            _put_aside(paths.checkpoints, step)
            continue
        return dataclasses.replace(whole, damage="; ".join(damage))
    if record.carried:
        raise CheckpointError(
            f"the adapter that this job begins with cannot be read ({'; '.join(damage) or 'it is missing'}): "
            "submit the job again"
        )
    return Preparation(None, damage="; ".join(damage))


def _restore_one(record: JobRecord, paths: JobPaths, shm: Path, step: int) -> Preparation:
    try:
        checkpoints.check_state(paths.checkpoints, step)
        if step == record.total_steps:
            return Preparation(None, trained=True)
        slot, ref, meta, tokens = checkpoints.load_state(paths.checkpoints, step, shm)
    except shared_memory.SlotError as error:
        raise HarliError(shared_memory.refusal("the checkpoint", error), code="shared_memory") from error
    except OSError as error:
        raise CheckpointError(str(error)) from error
    except UNREADABLE as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    slot.close()  # the file stays
    told = meta.get("tokens")  # meta.json, the other place, has no checksum of its own
    return Preparation(None, step, told if isinstance(told, int) else tokens, ref, meta)


def _put_aside(folder: Path, step: int) -> None:
    """Out of the way, so that the step can be written again; one is kept for whoever wants to look."""
    for old in folder.glob("step-*.bad"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        (folder / f"step-{step}").rename(folder / f"step-{step}.bad")
    except OSError as error:
        raise CheckpointError(f"the damaged {folder}/step-{step} cannot be put aside: {error}") from error

"""``submit --resume-from JOB``: what a new job takes over from one that is over.

Without data the training itself goes on: data, hyperparameters, and the newest whole checkpoint
with the optimizer's state and the position in schedule and data.  With data it is a new course:
only the adapter's weights carry over, as the new job's ``step-0`` checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, HarliError, StateError
from sglang_harli.protocol.internal import EvaluationState, state_in
from sglang_harli.protocol.public import Hyperparameters, SubmitArgs, parse_hyperparameters
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.data import batches, validation
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenReader
from sglang_harli.service.jobs import evaluations
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import CheckpointMetrics
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.transitions import EventDraft, JobRecord, Transition
from sglang_harli.service.tokenizer.retokenize import ROWS_IN, rows_folder

# What may change without changing which rows come when, or the shape of the state.
MAY_DIFFER = (
    *("n_epochs", "learning_rate", "lr_scheduler", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("checkpoint_every", "lora_dropout", "eval_steps", "early_stopping_patience"),
    *("early_stopping_min_delta", "publish_best"),
)
EVALUATION = (
    *("eval_steps", "eval_rows", "validation_split", "early_stopping_patience", "early_stopping_min_delta"),
    "publish_best",
)
SHAPE = ("lora_r", "lora_alpha", "use_rslora", "target_modules")  # of an adapter: fixed on any course


@dataclass(frozen=True, slots=True)
class Origin:
    """The job that is continued, and the new one's hyperparameters."""

    record: JobRecord
    paths: JobPaths
    hyperparameters: Hyperparameters
    new_course: bool  # there are other data; only the adapter carries over


@dataclass(frozen=True, slots=True)
class Start:
    """The checkpoint where a new job begins; step 0: from nothing."""

    step: int = 0
    tokens: int = 0
    carried: bool = False  # a ``step-0`` checkpoint is there, and needed
    damage: str = ""  # why better checkpoints were not taken
    evaluation: EvaluationState = field(default_factory=EvaluationState)
    kept: tuple[CheckpointMetrics, ...] = ()  # what is known of the checkpoints that were taken


def find(registry: JobRegistry, args: SubmitArgs) -> Origin:
    """The job that ``args.resume_from`` names, checked as far as its record says.  Raises
    HarliError: there is none, it is not over, its base is not served, or it cannot go on so."""
    assert args.resume_from is not None
    record = registry.get(args.resume_from)
    if not record.status.final:
        raise StateError(
            f"job {record.id} is {record.status}: only a job that is over can be continued; cancel it or let it end",
            param="resume_from",
        )
    check_not_deleted(record, "resume_from")
    if other := registry.other_base(record):
        raise ConfigError(
            f"job {record.id} cannot be continued here: {other}; start the server with the job's base",
            param="resume_from",
        )
    if not record.validated:
        raise StateError(
            f"job {record.id} ended before its files were accepted: submit them as a new job",
            param="resume_from",
        )
    new_course = bool(args.sha256 or args.training_file)
    values = msgspec.to_builtins(record.hyperparameters)
    if new_course:  # whether and how the new data are evaluated is not the old job's
        values = {name: value for name, value in values.items() if name not in EVALUATION}
    values |= args.hyperparameters
    hp = parse_hyperparameters(values)
    _check_same(record, hp, new_course)
    origin = Origin(record, JobPaths(registry.run_dir, record.id), hp, new_course)
    if not new_course:
        _check_left(origin)
    return origin


def check_not_deleted(record: JobRecord, param: str) -> None:
    """Raise ConfigError where the job's model was deleted."""
    if record.fine_tuned_model in record.deleted_models:
        raise ConfigError(
            f"{record.fine_tuned_model}, the model of job {record.id}, was deleted: there is no training on from it",
            param=param,
        )


def _check_same(record: JobRecord, hp: Hyperparameters, new_course: bool) -> None:
    def shown(values: Hyperparameters, name: str) -> str:
        value = getattr(values, name)
        return f"{name}={','.join(value) if isinstance(value, tuple) else value}"

    old = record.hyperparameters
    fixed = SHAPE if new_course else [n for n in Hyperparameters.__struct_fields__ if n not in MAY_DIFFER]
    changed = [name for name in fixed if getattr(old, name) != getattr(hp, name)]
    if not changed:
        return
    if new_course:
        fix = "an adapter keeps its shape: leave them out"
    else:
        fix = f"these may change: {', '.join(MAY_DIFFER)}; for anything else give --data, which begins a new course"
    raise ConfigError(
        f"job {record.id} was trained with {', '.join(shown(old, n) for n in changed)}, and cannot go on with "
        f"{', '.join(shown(hp, n) for n in changed)}: {fix}",
        param=changed[0],
    )


def _check_left(origin: Origin) -> None:
    """Something is left to do, as far as the record tells (the checkpoint is read later)."""
    record = origin.record
    total = batches.total_steps(batches.train_rows(record.data), origin.hyperparameters)
    if record.status == JobStatus.SUCCEEDED and total == record.total_steps and not record.stops_early:
        raise ConfigError(
            f"job {record.id} has done all of its {total} steps: raise n_epochs (now "
            f"{origin.hyperparameters.n_epochs}), or give --data to begin a new course with its adapter",
            param="resume_from",
        )
    if total < record.checkpoint_step:
        raise ConfigError(
            f"n_epochs={origin.hyperparameters.n_epochs} makes {total} steps, and job {record.id} has already done "
            f"{record.checkpoint_step}: raise n_epochs",
            param="n_epochs",
        )


def follow(record: JobRecord, origin: Origin, start: Start) -> JobRecord:
    """The new job's record with what it takes over."""
    old = origin.record
    values: dict[str, Any] = {
        "resumed_from": old.id,
        "carried": start.carried,
        "checkpoint_step": start.step,
        "checkpoint_tokens": start.tokens,
        "step": start.step,
        "trained_tokens": start.tokens,
        "base": old.base or record.base,
        "evaluation_state": start.evaluation,
        "evaluated_step": start.evaluation.step,
        "checkpoints": list(start.kept),
    }
    if not origin.new_course:
        data = {name: value for name, value in old.data.items() if name != ROWS_IN}
        values |= {"data": data, "data_sha256": old.data_sha256}
    return msgspec.structs.replace(record, **values)


def with_origin(change: Transition, start: Start) -> Transition:
    """The events of a new job, and what could not be taken over."""
    if not start.damage:
        return change
    text = f"another checkpoint was taken: {start.damage}"
    return Transition(change.record, (*change.drafts, EventDraft("warning", text, level="warn")))


# ------------------------------------------------------------------ in the worker thread
def take_data(origin: Origin, folder: Path) -> DataSummary:
    """The old job's data for a new one in ``folder``; either may be removed afterwards.  Raises
    HarliError: the files are gone or altered; OSError: the disk is full."""
    record = origin.record
    try:
        stored = rows_folder(record.data, origin.paths)
        tokens = TokenReader(stored)
        rows = len(tokens)
        tokens.close()
        if rows != record.data["rows"]:
            raise ValueError(f"{rows} rows instead of {record.data['rows']}")
    except (OSError, ValueError, KeyError) as error:
        raise HarliError(
            f"the data of job {record.id} cannot be read ({error}): give --data FILE",
            code="bad_data_files",
            param="resume_from",
        ) from error
    _link_files(stored, folder / "data")
    if record.data.get("validation"):
        _link_files(stored / validation.FOLDER, folder / "data" / validation.FOLDER)
    if stored != origin.paths.data:
        _link_files(origin.paths.data, folder / "data", "train.jsonl")
        _link_files(origin.paths.data, folder / "data", validation.FILE)
    known = {name: value for name, value in record.data.items() if name in DataSummary.__struct_fields__}
    return msgspec.convert(known, DataSummary)


def take_checkpoint(origin: Origin, folder: Path) -> Start:
    """The old job's newest whole checkpoint as the first one of the new job in ``folder``; on a new
    course that of its model, where it has one.  Raises HarliError: there is none, and what is
    there; OSError: the disk is full."""
    found, tokens, damage = _whole(origin)
    source, new = origin.paths.checkpoints, folder / "checkpoints"
    if origin.new_course:
        checkpoints.save_beginning(source / f"step-{found}", new / "step-0", origin.hyperparameters.seed)
        return Start(0, 0, True, damage)
    _link_files(source / f"step-{found}", new / f"step-{found}")
    carried = origin.record.carried and (source / "step-0").is_dir()
    if carried and found:
        _link_files(source / "step-0", new / "step-0")
    state, kept = _evaluations(origin, found, new)
    return Start(found, tokens, carried, damage, state, kept)


def _evaluations(
    origin: Origin, step: int, new: Path
) -> tuple[EvaluationState, tuple[CheckpointMetrics, ...]]:
    """What the evaluations up to ``step`` have come to, with patience anew; and what is known of
    the checkpoints in ``new``, to which the best one is added."""
    source = origin.paths.checkpoints
    meta = checkpoints.plain_values(source, step)
    state = evaluations.go_back(origin.record, step, state_in(meta)).evaluation_state
    there = {step}
    if 0 < state.best_step < step:
        with contextlib.suppress(CheckpointError):
            checkpoints.check_state(source, state.best_step)
            _link_files(source / f"step-{state.best_step}", new / f"step-{state.best_step}")
            there.add(state.best_step)
    if state.best_step not in there:  # it cannot be published any more
        state = msgspec.structs.replace(state, best_step=0, best_loss=None)
    kept = tuple(known for known in origin.record.checkpoints if known.step in there)
    return msgspec.structs.replace(state, stale=0), kept


def _whole(origin: Origin) -> tuple[int, int, str]:
    """Step and tokens, and why better ones are not taken."""
    record, damage = origin.record, []
    steps = checkpoints.steps(origin.paths.checkpoints)[::-1]
    if origin.new_course and record.fine_tuned_model is not None:  # it may be the best one, not the last
        steps.sort(key=lambda step: step != record.model_step)
    for step in steps:
        if step > record.checkpoint_step:  # written, but the store does not know
            continue
        try:
            meta = checkpoints.check_state(origin.paths.checkpoints, step)
            return step, int(meta["trained_tokens"]), "; ".join(damage)
        except CheckpointError as error:
            damage.append(error.message)
    before = f"it ended at step {record.step}, before its first one"
    gone = f"none is left in {origin.paths.checkpoints}"
    what = "; ".join(damage) or (gone if record.checkpoint_step else before)
    raise HarliError(
        f"job {record.id} has no checkpoint to go on from ({what}): submit its data as a new job",
        code="bad_checkpoint",
        param="resume_from",
    )


def _link_files(source: Path, target: Path, pattern: str = "*") -> None:
    """The files of ``source`` in a new folder: hard links (never written again), or copies."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(pattern):
        if path.is_dir():
            continue
        try:
            os.link(path, target / path.name)
        except OSError:  # a file system without links; a full disk says so at the copy
            shutil.copy2(path, target / path.name)

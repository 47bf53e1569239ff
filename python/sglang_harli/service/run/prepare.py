"""The blocking steps of preparing a run: its data, and the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import msgspec
from safetensors import SafetensorError

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.failpoints import ReadFailpoint, failpoint
from sglang_harli.protocol import shared_memory, trouble
from sglang_harli.protocol.internal import ServedLimits
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.data import validation as validation_data
from sglang_harli.service.data.batches import BatchOrder
from sglang_harli.service.data.token_store import TokenReader
from sglang_harli.service.jobs import admission
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.transitions import JobRecord
from sglang_harli.service.run.state import Preparation
from sglang_harli.service.tokenizer import retokenize
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer
from sglang_harli.service.tokenizer.retokenize import NotHereError as NotHereError
from sglang_harli.service.tokenizer.retokenize import rows_folder

# What reading files raises that are not as they were written.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError),
    *(BadZipFile, zlib.error, SafetensorError, msgspec.MsgspecError),
)


def prepare(
    record: JobRecord,
    paths: JobPaths,
    limits: ServedLimits,
    tokenizer: ModelTokenizer,
    shm: Path | None,
    stop: Callable[[], bool] = lambda: False,
) -> Preparation:
    """The job's data and, with ``shm``, its checkpoint in a slot there; raises as the two below.

    Rows that serving would see otherwise are made again, but not for a run that the scheduler holds
    (no ``shm``).  The checkpoint, which takes long, comes last unless nothing may be left to train.
    """
    perhaps_trained = record.complete
    found = restore(record, paths, shm) if shm is not None and perhaps_trained else Preparation(None)
    if found.trained:
        return found
    try:
        rows = record if shm is None else retokenize.as_served(record, paths, limits, tokenizer, stop)
        plan = open_feeder(rows, paths, limits)
        if shm is not None and not perhaps_trained:
            found = restore(record, paths, shm)
    except BaseException:
        if found.restore is not None:
            Path(found.restore.path).unlink(missing_ok=True)
        raise
    new = rows.data if rows is not record else None
    return dataclasses.replace(found, plan=plan, data=new, total_steps=rows.total_steps)


def open_feeder(record: JobRecord, paths: JobPaths, limits: ServedLimits) -> BatchOrder:
    """The job's data, checked against what is served once more.

    Raises NotHereError: another server's limits admitted it; HarliError: it fits no such model, or
    its data is not readable; OSError, MemoryError: a read failed.
    """
    data = record.data
    try:
        admission.check_hyperparameters(record.hyperparameters, limits)
        admission.check_data(
            record.hyperparameters,
            data["longest_row"],
            data["longest_line"],
            data["rows"],
            limits,
            data.get("unit", "line"),
        )
        admission.check_vocabulary(data["largest_id"], limits)
        admission.check_validation(data.get("validation"), record.hyperparameters, data, limits)
    except HarliError as error:
        if record.admitted:  # it fitted the server that accepted it
            raise NotHereError(f"it does not fit this server: {error.message}", param=error.param) from error
        raise
    folder = rows_folder(data, paths)
    try:
        failpoint(ReadFailpoint.DATA)
        tokens = TokenReader(folder)
        validation = TokenReader(folder / validation_data.FOLDER) if data.get("validation") else None
        feeder = BatchOrder(tokens, record.hyperparameters, validation)
    except UNREADABLE as error:
        if trouble.passes(error):
            raise
        raise HarliError(f"the job's data cannot be read: {error}", code="bad_data_files") from error
    if feeder.total_steps != record.total_steps:
        raise HarliError(
            f"{folder} holds data for {feeder.total_steps} steps, not {record.total_steps}: submit it again",
            code="bad_data_files",
        )
    return feeder


def restore(record: JobRecord, paths: JobPaths, shm: Path) -> Preparation:
    """The job's newest whole checkpoint in a slot; a damaged one is put aside as ``step-N.bad``.

    With none at all the run starts from nothing; ``plan`` is left open.  Raises CheckpointError:
    none is whole, and the job carries another's adapter; NotReadyError: shared memory is full;
    HarliError: it is too small; OSError, MemoryError: a read failed.
    """
    damage: list[str] = []
    newest = record.checkpoint_step
    found = checkpoints.steps(paths.checkpoints)
    if newest and newest not in found:
        damage.append(f"the checkpoint of step {newest} is missing")
    for step in reversed(found):
        if step > newest or (step == 0 and not record.carried):  # written, but the store does not know
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
        if step == record.last_step and record.complete:
            return Preparation(None, trained=True)
        slot, ref, meta, tokens = checkpoints.load_state(paths.checkpoints, step, shm)
    except shared_memory.SharedBufferError as error:
        kind = NotReadyError if shared_memory.passes(error) else HarliError
        raise kind(shared_memory.refusal("the checkpoint", error), code="shared_memory") from error
    except UNREADABLE as error:
        if trouble.passes(error):  # whole or not: it is not to be lost for that
            raise
        text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(text) from error
    slot.close()  # the file stays
    tokens_there = meta.get("tokens")  # meta.json, the other place, has no checksum of its own
    return Preparation(None, step, tokens_there if isinstance(tokens_there, int) else tokens, ref, meta)


def _put_aside(folder: Path, step: int) -> None:
    """Rename it, so that the step can be written again; one is kept, to be looked at."""
    for old in folder.glob("step-*.bad"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        (folder / f"step-{step}").rename(folder / f"step-{step}.bad")
    except OSError as error:
        if trouble.passes(error):
            raise
        raise CheckpointError(f"the damaged {folder}/step-{step} cannot be put aside: {error}") from error

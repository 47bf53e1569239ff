"""A job's rows made again from its data file, where another tokenizer, template or limit serves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from sglang_harli.errors import DataError, HarliError, NotReadyError
from sglang_harli.protocol.internal import ServedLimits
from sglang_harli.service.data import batches, dataset, validation
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.jobs.folder import JobPaths, fsync_folder, fsync_tree
from sglang_harli.service.jobs.transitions import JobRecord
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer

ROWS_IN = "rows_in"  # in a job's data: the folder in its data folder that holds its rows, where it is not that itself
_NEW = ".rows-new"


class NotHereError(HarliError):
    """This server cannot run the job; another one may."""

    code = "other_server"


def rows_folder(data: dict[str, Any], paths: JobPaths) -> Path:
    """Where the rows of a job with this ``data`` lie."""
    return paths.data / data.get(ROWS_IN, ".")


def as_served(
    record: JobRecord,
    paths: JobPaths,
    limits: ServedLimits,
    tokenizer: ModelTokenizer,
    stop: Callable[[], bool],
) -> JobRecord:
    """The job with the rows that serving would see: itself, or with new, durable ones.  Blocking.

    The old ones stay.  Raises NotHereError: its file is not accepted here or is gone, or rows of
    trained steps would be others; NotReadyError: no tokenizer now, or stopped; OSError,
    MemoryError: the new rows cannot be stored.
    """
    try:
        rows = tokenizer.get()
    except HarliError as error:  # no fault of the job's
        raise NotReadyError(error.message, code=error.code) from error
    data = record.data
    if all(_fits(part, rows, limits) for part in (data, data.get("validation"))):
        return record
    try:
        summary = _scan(record, paths, rows, limits, stop)
        steps = batches.total_steps(summary.rows - summary.validation_rows, record.hyperparameters)
        _check_trained(record, summary, steps)
        folder = _settle(record, paths)
    except DataError as error:
        raise NotHereError(
            f"its data is not accepted by this server's tokenizer and chat template ({error.message}): start the "
            "server with those that it was submitted to, or cancel it and submit data that this one accepts"
        ) from error
    except FileNotFoundError as error:
        raise NotHereError(
            f"its rows are another tokenizer's and its data is gone ({error}): start the server with the tokenizer "
            "and chat template that it was submitted to, or submit it again"
        ) from error
    finally:
        shutil.rmtree(paths.data / _NEW, ignore_errors=True)
    new = summary.builtins() | _file(data) | {ROWS_IN: folder}
    return msgspec.structs.replace(record, data=new, total_steps=steps)


def _fits(data: dict[str, Any] | None, rows: RowEncoder, limits: ServedLimits) -> bool:
    """Whether rows of this ``data`` are those that serving sees; None: there are none."""
    if data is None:
        return True
    return data["tokenizer"] == rows.fingerprint and data["longest_row"] <= limits.max_seq_length


def _file(data: dict[str, Any]) -> dict[str, Any]:
    """What stays of a file's data whatever its rows are."""
    return {name: data[name] for name in ("bytes", "sha256") if name in data}


def _scan(
    record: JobRecord,
    paths: JobPaths,
    tokenizer: RowEncoder,
    limits: ServedLimits,
    stop: Callable[[], bool],
) -> DataSummary:
    hp, data = record.hyperparameters, record.data
    new = paths.data / _NEW
    shutil.rmtree(new, ignore_errors=True)

    def scan(file: Path, folder: Path, name: str) -> DataSummary:
        with TokenWriter(folder) as writer:
            return dataset.scan(
                file,
                tokenizer,
                name=name,
                max_length=hp.max_seq_length if hp.max_seq_length is not None else limits.max_seq_length,
                on_overflow=hp.on_overflow,
                writer=writer,
                stop=stop,
            )

    summary = scan(paths.data / "train.jsonl", new, data.get("file", "train.jsonl"))
    validation.hold_out(new, hp, summary)
    if old := data.get("validation"):
        found = scan(paths.data / validation.FILE, new / validation.FOLDER, old["file"])
        summary.validation = found.builtins() | _file(old)
    return summary


def _check_trained(record: JobRecord, summary: DataSummary, steps: int) -> None:
    """A job that has trained goes on where the same rows and steps are left."""
    if record.checkpoint_step == 0 or (summary.rows, steps) == (record.data["rows"], record.total_steps):
        return
    raise NotHereError(
        f"it has trained {record.checkpoint_step} steps on rows of another tokenizer, chat template or limit: this "
        f"server's would be {summary.rows} rows in {steps} steps, not {record.data['rows']} in "
        f"{record.total_steps}; start the server with the former ones (--chat-template, --revision, --context-length), "
        "or submit the data again"
    )


def _settle(record: JobRecord, paths: JobPaths) -> str:
    """The new rows under a name of their own, durable: the store does not know them yet."""
    new, name = paths.data / _NEW, f"rows-{record.attempt}"
    fsync_tree(new)
    for old in paths.data.glob("rows-*"):
        if old.name != record.data.get(ROWS_IN) and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    new.rename(paths.data / name)
    fsync_folder(paths.data)
    return name

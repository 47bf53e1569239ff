"""A job's validation data: whether what is asked of it fits together, and how it is taken in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sglang_harli.errors import ConfigError, DataError
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.data import dataset
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.data.validation import FOLDER, held_out
from sglang_harli.service.rows.encoder import RowEncoder

FILE = "validation.jsonl"  # in a job's data folder, beside the training file
_NO_DATA = "give validation data (--validation FILE) or validation_split"


def check(hp: Hyperparameters, *, file: bool) -> None:
    """Raise ConfigError where hyperparameters contradict each other, or the validation data.
    ``file``: the job has a validation file."""
    if file and hp.validation_split:
        raise _refused(
            "validation_split",
            hp.validation_split,
            "the job has a validation file: leave one of the two out",
        )
    if not file and not hp.validation_split:
        for name in ("early_stopping_patience", "eval_steps", "eval_rows"):
            if getattr(hp, name):
                raise _refused(name, getattr(hp, name), f"nothing is evaluated: {_NO_DATA}")
        if hp.publish_best:
            raise _refused("publish_best", "true", f"the best checkpoint is not known: {_NO_DATA}")
    if hp.early_stopping_min_delta and hp.early_stopping_patience is None:
        raise _refused(
            "early_stopping_min_delta", hp.early_stopping_min_delta, "it counts with early_stopping_patience"
        )
    if hp.early_stopping_patience is not None and hp.eval_steps == 0:
        raise _refused("eval_steps", 0, "early_stopping_patience needs evaluations before the last step")


def _refused(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{name}={value} is not accepted: {why}", param=name)


def hold_out(folder: Path, hp: Hyperparameters, summary: DataSummary) -> None:
    """Note in ``summary`` how many of the rows in ``folder`` ``validation_split`` holds out.  Raises
    DataError: there is only one line, which cannot be in both parts."""
    if not hp.validation_split:
        return
    tokens = TokenReader(folder)
    try:
        held = int(held_out(tokens.lines, hp).sum())
    finally:
        tokens.close()
    if not held:
        raise DataError(
            f"{summary.file}: validation_split={hp.validation_split:g} needs at least 2 lines of data, and there is one",
            param="data",
        )
    summary.validation_rows = held


def take_in(
    path: Path,
    folder: Path,
    tokenizer: RowEncoder,
    hp: Hyperparameters,
    *,
    name: str,
    max_length: int | None,
    stop: Callable[[], bool],
) -> DataSummary:
    """The validation file at ``path``, checked as a training file is, into a job's data ``folder``:
    the file itself, which is moved, and its rows as tokens.  Raises as ``dataset.scan``."""
    file = folder / FILE
    if path != file:
        path.replace(file)
    with TokenWriter(folder / FOLDER) as writer:
        return dataset.scan(
            file,
            tokenizer,
            name=name,
            max_length=max_length,
            on_overflow=hp.on_overflow,
            writer=writer,
            stop=stop,
        )

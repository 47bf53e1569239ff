"""A job's validation data: whether what is asked of it fits together, and how it is taken in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sglang_harli.errors import ConfigError, DataError, ProtocolError
from sglang_harli.protocol.public import Hyperparameters, SubmitArgs
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.validation import FILE, FOLDER

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


class ValidationFile(NamedTuple):
    """A validation file that has come: where it lies now, how its owner calls it, its checksum."""

    path: Path
    name: str
    sha256: str


def take_in(
    found: ValidationFile, folder: Path, scan: Callable[[Path, Path, str], DataSummary]
) -> dict[str, Any]:
    """Move a validation file into a job's data ``folder`` and make its rows there; what is noted of
    it in the job's data.

    ``scan``: checks a file under a name and stores its rows in a folder.  Raises DataError: lines
    are not accepted; OSError: the disk is full.
    """
    file = folder / FILE
    found.path.replace(file)
    try:
        summary = scan(file, folder / FOLDER, found.name)
    except DataError as error:
        raise DataError(error.message, param="validation", details=error.details) from error
    return summary.builtins() | {"bytes": file.stat().st_size, "sha256": found.sha256}


def check_arguments(args: SubmitArgs) -> None:
    """Raise ProtocolError unless a submit's words on its validation file fit together."""
    if args.validation_upload is None:
        if args.validation_sha256 or args.validation_size or args.validation_filename:
            raise ProtocolError(
                "a validation file comes by `upload`, and the submit names it in validation_upload",
                param="validation_upload",
            )
        return
    if not args.validation_sha256:
        raise ProtocolError(
            "validation_upload needs validation_size and validation_sha256", param="validation_upload"
        )
    if not args.sha256:
        raise ProtocolError(
            "a job that goes on keeps its validation data: give a validation file with data, which begins a new course",
            param="validation_upload",
        )
    if args.validation_upload == args.upload:
        raise ProtocolError(
            "validation_upload and upload are the same: upload each file", param="validation_upload"
        )

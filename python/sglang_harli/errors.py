"""The error family: every message says what is wrong, where, and what to do.

*You must change something* is ``HarliError`` (and its named children), *not now, try again* is
``NotReadyError``.  Each also inherits the stdlib type that a caller would expect, and keeps its
fields picklable (they cross process borders).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

SHOWN = 80


def shown(value: Any) -> str:
    """A value in a message: in Python's form, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


class HarliError(Exception):
    """Base of all errors that harli raises on purpose.

    Args:
        message: one sentence naming the thing at fault and the accepted values or the fix.
        code: a stable snake_case word for scripts (goes over the wire).
        param: the field or option at fault.
        details: more rows of the same report (for example one per bad data line).
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.details = details or []

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.param, self.details)


def _rebuild(
    cls: type[HarliError], message: str, code: str, param: str | None, details: list[Any]
) -> HarliError:
    return cls(message, code=code, param=param, details=details)


def grouped(details: list[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Which lines or rows, why and how many: neighbours with the same reason together."""
    for reason, found in itertools.groupby(details, lambda row: row.get("reason")):
        rows = list(found)
        unit = "row" if "row" in rows[0] else "line"
        first, last = rows[0].get(unit), rows[-1].get(unit)
        where = f"{unit} {first}" if len(rows) == 1 else f"{unit}s {first} to {last}"
        if unit == "row" and len(rows) == 1 and rows[0].get("line") is not None:
            where += f" (line {rows[0]['line']})"
        yield where, str(reason), len(rows)


class ConfigError(HarliError, ValueError):
    """An option or hyperparameter has a value that is not accepted."""

    code = "invalid_value"


class UnsupportedError(HarliError, ValueError):
    """The model, the SGLang version or a SGLang option does not go together with finetuning."""

    code = "unsupported"


class DataError(HarliError, ValueError):
    """The training file is not acceptable; ``details`` holds one row per line at fault."""

    code = "invalid_data"


class NotFoundError(HarliError, KeyError):
    """No such job."""

    code = "not_found"

    def __str__(self) -> str:  # KeyError would print the repr
        return self.message


class StateError(HarliError, RuntimeError):
    """The job's state does not allow this (for example resuming a finished job)."""

    code = "invalid_state"


class ProtocolError(HarliError, ValueError):
    """A message that is not of the protocol."""

    code = "bad_request"


class NotReadyError(HarliError, RuntimeError):
    """Not now: try again later (the server is starting, or the service is away)."""

    code = "not_ready"


class TrainingError(HarliError, RuntimeError):
    """The run itself failed (out of memory, loss not finite, ...); serving goes on."""

    code = "training_failed"

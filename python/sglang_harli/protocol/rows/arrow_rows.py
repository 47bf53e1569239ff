"""Rows of Arrow tables (Parquet files, ``datasets`` folders) as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

BATCH_ROWS = 32  # read at once: what one batch takes in memory is bounded by the longest rows
WHOLE_BATCH_BYTES = 16 << 20  # a larger batch becomes Python objects row by row
_AS_TEXT = (date, datetime, time, timedelta, Decimal, UUID)


class JsonRow(NamedTuple):
    """A row as a JSON object, or why it is none.  ``left_out``: fields of tools or tool calls that
    were null are not in it."""

    text: bytes = b""
    problem: str = ""
    left_out: bool = False


def json_rows(batch: Any) -> Iterator[JsonRow]:
    """The rows of a ``pyarrow.RecordBatch``."""
    if batch.nbytes <= WHOLE_BATCH_BYTES:
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except (UnicodeDecodeError, KeyError, ValueError, OverflowError):
            rows = None
        if rows is not None:
            yield from map(_json, rows)
            return
    for at in range(batch.num_rows):
        try:
            [row] = batch.slice(at, 1).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            yield JsonRow(problem=f"a text that is not UTF-8: byte {error.object[error.start]:#04x}")
            continue
        except (KeyError, ValueError, OverflowError) as error:  # the last: a time that Python has not
            yield JsonRow(problem=f"a value that cannot be read: {error}")
            continue
        yield _json(row)


def _json(row: dict[str, Any]) -> JsonRow:
    left_out = _without_nulls(row)
    try:
        # NaN stays, to be named where the row is read: it is no fault in fields that are not used.
        return JsonRow(json.dumps(row, ensure_ascii=False, default=_other).encode(), left_out=left_out)
    except (TypeError, ValueError, RecursionError) as error:
        return JsonRow(problem=f"a value that JSON has not: {error}")


def _without_nulls(row: dict[str, Any]) -> bool:
    """Take out of tools and tool calls the fields that are null.  Returns whether there was one.

    A column of objects has every field of each of its rows, null where a row had none.
    """
    found = _strip(row.get("tools"))
    messages = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            found |= _strip(message.get("tool_calls"))
    return found


def _strip(value: Any) -> bool:
    found = False
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            empty = [name for name, inner in part.items() if inner is None]
            for name in empty:
                del part[name]
            found |= bool(empty)
            left += part.values()
        elif isinstance(part, list):
            left += part
    return found


def _other(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise TypeError("bytes that are no text in UTF-8") from error
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")

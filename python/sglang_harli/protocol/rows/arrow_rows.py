"""Rows of Arrow tables (Parquet files, ``datasets`` folders) as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

BATCH_ROWS = 32  # read at once: what one batch takes in memory is bounded by the longest rows
WHOLE_BATCH_BYTES = 16 << 20  # a larger batch becomes Python objects row by row
_AS_TEXT = (date, datetime, time, timedelta, Decimal, UUID)


def json_rows(batch: Any) -> Iterator[bytes | str]:
    """Each row of a ``pyarrow.RecordBatch`` as a JSON object, or as a ``str`` why it is none."""
    if batch.nbytes <= WHOLE_BATCH_BYTES:
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except (UnicodeDecodeError, KeyError, ValueError):
            rows = None
        if rows is not None:
            yield from map(_json, rows)
            return
    for at in range(batch.num_rows):
        try:
            [row] = batch.slice(at, 1).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            yield f"a text that is not UTF-8: byte {error.object[error.start]:#04x}"
            continue
        except (KeyError, ValueError) as error:
            yield f"a value that cannot be read: {error}"
            continue
        yield _json(row)


def _json(row: dict[str, Any]) -> bytes | str:
    try:
        # NaN stays, to be named where the row is read: it is no fault in fields that are not used.
        return json.dumps(row, ensure_ascii=False, default=_other).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return f"a value that JSON has not: {error}"


def _other(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise TypeError("bytes that are no text in UTF-8") from error
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")

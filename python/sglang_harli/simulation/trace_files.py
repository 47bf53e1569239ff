"""Traces in files: the published CSV formats, and our own small one, by their header.

- Azure LLM inference traces: ``TIMESTAMP, ContextTokens, GeneratedTokens`` (times of day).
- BurstGPT: ``Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type`` (seconds;
  newer files have more columns).  Rows without a response are failures, left out.
- ours: ``arrival_s, prompt_tokens, output_tokens``, comment lines with ``#`` before the header.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from sglang_harli.errors import DataError
from sglang_harli.simulation.traces import Trace, TraceRequest, Workload

OURS = ("arrival_s", "prompt_tokens", "output_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
FORMATS = (OURS, AZURE, BURSTGPT)
LONGEST_TOKENS = 10_000_000


def read(path: str | Path, *, limit: int | None = None) -> Trace:
    """The requests of a trace file in the order of arrival, the first at 0 s; at most ``limit``
    rows.  DataError names file, line and field of a bad row, or an unreadable or unknown file."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(path, file, limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read as a CSV file: {error}", code="unreadable_file", param="trace"
        ) from error
    if not rows:
        raise DataError(f"{path}: no request in it: give at least one row", code="empty_file", param="trace")
    rows.sort(key=lambda row: row[0])
    first_s = rows[0][0]
    return Trace(path.stem, tuple(TraceRequest(at - first_s, prompt, output) for at, prompt, output in rows))


def _rows(path: Path, file: Iterable[str], limit: int | None) -> Iterator[tuple[float, int, int]]:
    reader = csv.reader(file)
    columns: list[int] = []
    fields: tuple[str, ...] = OURS
    taken = 0
    for row in reader:
        if not row or (not columns and row[0].startswith("#")):
            continue
        if not columns:
            columns, fields = _columns(path, reader.line_num, row)
            continue
        if limit is not None and taken >= limit:
            return
        taken += 1
        where = f"{path}: line {reader.line_num}"
        if len(row) <= max(columns):
            missing = next(name for name, column in zip(fields, columns, strict=True) if column >= len(row))
            raise _bad(where, missing, f"the row has {len(row)} fields")
        at, prompt, output = (row[column].strip() for column in columns)
        at_s = _clock(where, fields[0], at) if fields == AZURE else _seconds(where, fields[0], at)
        tokens = _tokens(where, fields[1], prompt), _tokens(where, fields[2], output)
        if tokens[1]:
            yield at_s, max(tokens[0], 1), tokens[1]


def _columns(path: Path, line: int, header: list[str]) -> tuple[list[int], tuple[str, ...]]:
    names = [name.strip() for name in header]
    for fields in FORMATS:
        if set(fields) <= set(names):
            return [names.index(field) for field in fields], fields
    known = "; ".join(", ".join(fields) for fields in FORMATS)
    raise DataError(
        f"{path}: line {line}: the header {', '.join(names)[:200]!r} is of no known trace format: it needs the columns {known}",
        param="trace",
    )


def _bad(where: str, field: str, what: str) -> DataError:
    return DataError(f"{where}: field {field!r}: {what}", param="trace")


def _clock(where: str, field: str, text: str) -> float:
    # the 2023 files have seven digits after the second, one more than the standard library reads
    head, dot, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        return datetime.fromisoformat(f"{head}{dot}{digits[:6]}{rest[len(digits) :]}").timestamp()
    except ValueError as error:
        raise _bad(where, field, f"{text!r} is not a time such as 2023-11-16 18:15:46.6805900") from error


def _seconds(where: str, field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise _bad(where, field, f"{text!r} is not a number of seconds")
    return value


def _tokens(where: str, field: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= LONGEST_TOKENS:
        raise _bad(where, field, f"{text!r} is not a number of tokens from 0 to {LONGEST_TOKENS}")
    return value


def text(trace: Trace, kind: Workload) -> str:
    """Our format: what made it, in comments, then the header and a row for each request."""
    lines = [f"# {trace.name}", f"# source: {kind.source}", ",".join(OURS)]
    lines += [f"{row.arrival_s:.4f},{row.prompt_tokens},{row.output_tokens}" for row in trace.requests]
    return "\n".join(lines) + "\n"

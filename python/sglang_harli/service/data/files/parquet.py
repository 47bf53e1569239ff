"""The rows of a Parquet file, read by a process of its own (``parquet_child``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sglang_harli.protocol.rows import forms
from sglang_harli.service.data.files import lines, packed, parquet_child, tables
from sglang_harli.service.data.files.lines import Line
from sglang_harli.service.data.files.record import Record
from sglang_harli.service.data.files.row_json import RowReader, check_values, too_long
from sglang_harli.service.rows.error import FileFault, RowError

# One allocator, which gives memory back, and no threads that would compete with decode steps.
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def records(path: Path, reader: RowReader) -> Iterator[Record]:
    """The rows, numbered from 1.  Raises FileFault: the file cannot be read, expands beyond the
    bounds, or has no columns of an accepted form; pyarrow is missing."""
    command = [sys.executable, "-P", "-m", parquet_child.__name__, str(path), str(lines.MAX_LINE_BYTES)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | _ENVIRONMENT,
    )
    assert child.stdout is not None
    try:
        yield from _rows(child.stdout, path.stat().st_size, reader)
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def _rows(file: IO[bytes], packed_bytes: int, reader: RowReader) -> Iterator[Record]:
    number = size = 0
    left_out_of: list[str] = []
    while raw := file.readline(lines.MAX_LINE_BYTES + 2):
        sign, body = raw[:1], raw[1:].rstrip(b"\n")
        if sign == b"D":
            return
        if sign == b"F":
            raise FileFault(str(json.loads(body)))
        if sign == b"H":
            columns = [str(name) for name in json.loads(body)]
            tables.check_columns(columns)
            left_out_of = [name for name in columns if name not in forms.ALL]
            continue
        number += 1
        size += int(body) if sign == b"L" else len(body)
        packed.check_expansion("the Parquet file expands to", size, packed_bytes)
        yield _record(number, sign, body, left_out_of, reader)
    raise FileFault(
        "the Parquet file cannot be read: the process that reads it ended, as it does where a file is damaged or "
        f"expands to more than {parquet_child.MEMORY_BYTES >> 30} GiB; write it again, or as JSONL"
    )


def _record(number: int, sign: bytes, body: bytes, ignored: list[str], reader: RowReader) -> Record:
    try:
        if sign == b"L":
            raise too_long("the row")
        if sign == b"E":
            raise RowError(f"it holds {json.loads(body)}")
        row = reader.read(Line(number, body))
        row = tables.complete(row, reader)
        check_values(row)
    except RowError as error:
        return Record(number, error=error)
    return Record(number, value=row | dict.fromkeys(ignored, ""), left_out=sign == b"N")

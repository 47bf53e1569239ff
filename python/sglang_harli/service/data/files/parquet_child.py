"""The process that reads a Parquet file, and writes its rows as JSON to standard output.

A process of its own: a file that expands without end, or on which pyarrow's C++ crashes, ends this
process and nothing else.  Each line begins with a sign: ``H`` the header (names of columns), ``R``
a row, ``N`` one of which nulls were left out, ``E`` why a row is none, ``L`` a row that is too long
(its bytes), ``F`` why the file is not read on, ``D`` the end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

from sglang_harli.protocol.rows import arrow_rows, forms
from sglang_harli.protocol.rows.arrow_rows import JsonRow

MEMORY_BYTES = 3 << 30  # of addresses beyond what is there once pyarrow is loaded: row groups are streamed
MAX_FOOTER_BYTES = 64 << 20
_PIECE = 1 << 20
_MAGIC = b"PAR1"


def main(path: str, max_row_bytes: int) -> None:
    out = sys.stdout.buffer

    def say(sign: bytes, body: bytes = b"") -> None:
        out.write(sign + body + b"\n")

    try:
        for line in _lines(path):
            if isinstance(line, list):
                say(b"H", json.dumps(line).encode())
            elif line.problem:
                say(b"E", json.dumps(line.problem).encode())
            elif len(line.text) > max_row_bytes:
                say(b"L", str(len(line.text)).encode())
            else:
                say(b"N" if line.left_out else b"R", line.text)
        say(b"D")
    except _Refusal as refusal:
        say(b"F", json.dumps(str(refusal)).encode())
    except MemoryError:
        say(b"F", json.dumps(OVER_MEMORY).encode())
    out.flush()


OVER_MEMORY = (
    f"reading a few rows of the Parquet file takes more than {MEMORY_BYTES >> 30} GiB of memory: write it with "
    "shorter rows, or as JSONL"
)


class _Refusal(Exception):
    """Why the file is not read."""


def _lines(path: str) -> Iterator[JsonRow | list[str]]:
    """The names of the columns, then the rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _Refusal(
            f"reading Parquet needs pyarrow, which cannot be loaded where the file is read ({error}): install it, "
            "or write the rows as JSONL"
        ) from error
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    _limit_memory()
    _check_footer(path)
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_PIECE)
        names = list(file.schema_arrow.names)
        yield names
        wanted = [name for name in names if name in forms.ALL]
        for batch in file.iter_batches(arrow_rows.BATCH_ROWS, columns=wanted, use_threads=False):
            yield from arrow_rows.json_rows(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        said = str(error).strip().splitlines()
        raise _Refusal(
            f"the Parquet file is damaged, or written in a way that pyarrow {pa.__version__} does not read "
            f"({said[0][:300] if said else type(error).__name__})"
        ) from error


def _check_footer(path: str) -> None:
    """Refuse a file that is cut off, and one whose description alone would fill the memory."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if size < 12 or tail[4:] != _MAGIC:
        raise _Refusal("the Parquet file does not end as one does: it was cut off, write or copy it again")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(size, MAX_FOOTER_BYTES):
        raise _Refusal(
            f"the Parquet file's description of its columns has {footer:,} bytes, at most "
            f"{min(size, MAX_FOOTER_BYTES):,} are accepted: write it again with larger row groups"
        )


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits: Any = resource.getrlimit(resource.RLIMIT_AS)
    most = used + MEMORY_BYTES
    if limits[1] != resource.RLIM_INFINITY:
        most = min(most, limits[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except BrokenPipeError:  # the reader has gone
        os._exit(1)

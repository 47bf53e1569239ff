"""The bytes of a training file, unpacked as they are read where they are gzip's."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sglang_harli.protocol.public import MAX_DATA_BYTES
from sglang_harli.service.rows.error import FileFault

GZIP = b"\x1f\x8b"
# A packed file may hold what one may that comes unpacked.
MAX_EXPANDED_BYTES = MAX_DATA_BYTES
# Text shrinks to a tenth or so, gzip's most is a thousandth: what shrinks more than this is made to
# fill a machine.  Small files are left alone: a hundred equal rows may well shrink so.
MAX_RATIO = 200
FREE_BYTES = 64 << 20
_PIECE = 1 << 16

Opener = Callable[[], BinaryIO]


def opener(path: Path) -> Opener:
    """Opens the file for reading, from its beginning."""
    return lambda: path.open("rb")


def unpacking(path: Path) -> Opener:
    """Opens a gzip file for reading what is in it.

    The reading raises FileFault: it is damaged, or expands beyond the bounds.
    """
    return lambda: io.BufferedReader(_Unpacked(path), _PIECE)  # type: ignore[return-value]


def check_expansion(what: str, count: int, packed: int) -> None:
    """Raise FileFault where ``packed`` bytes have become too many, ``count``."""
    if count > MAX_EXPANDED_BYTES:
        raise FileFault(
            f"{what} more than {MAX_EXPANDED_BYTES >> 20:,} MiB of rows, the most that a file may have: split it"
        )
    if count > max(FREE_BYTES, MAX_RATIO * packed):
        raise FileFault(
            f"{what} more than {MAX_RATIO} times its size, which rows of text do not: give the rows as JSONL, unpacked"
        )


class _Unpacked(io.RawIOBase):
    """What is in a gzip file, piece by piece in bounded memory."""

    def __init__(self, path: Path) -> None:
        self._packed = path.open("rb")
        self._file = gzip.GzipFile(fileobj=self._packed, mode="rb")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._file.read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = "ends early" if isinstance(error, EOFError) else f"is damaged ({error})"
            raise FileFault(
                f"the gzip archive {what}, {self._count:,} bytes of rows into it: pack it again"
            ) from error
        self._count += len(piece)
        check_expansion("the gzip archive expands to", self._count, self._packed.tell())
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()

"""Training data on the client's side, read piece by piece: never in memory as a whole."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from sglang_harli.errors import DataError
from sglang_harli.protocol import public

Data = str | os.PathLike[str] | bytes | Iterable[Mapping[str, Any]]
SPOOL_BYTES = 8 << 20  # rows beyond that go to a temporary file
_PIECE = 1 << 20


class DataSource:
    """The bytes of one submit.

    Args:
        data: path of a JSONL file, its bytes, or rows.

    Attributes:
        name: how the job calls it; ``size``: in bytes.

    Raises:
        DataError: it cannot be read, or is larger than a submit may be.
    """

    def __init__(self, data: Data) -> None:
        self._file: BinaryIO
        if isinstance(data, bytes | bytearray | memoryview):
            self.name, self._file = "data.jsonl", io.BytesIO(data)
        elif isinstance(data, str | os.PathLike):
            path = Path(data)
            try:
                self.name, self._file = path.name, path.open("rb")
            except OSError as error:
                raise _unreadable(path, error) from error
        else:
            self.name, self._file = "rows.jsonl", _spool(data)
        try:
            self.size = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            self._file.close()
            raise _unreadable(self.name, error) from error
        if self.size > public.MAX_DATA_BYTES:
            self._file.close()
            raise DataError(
                f"{self.name} has {self.size} bytes; at most {public.MAX_DATA_BYTES} are accepted",
                param="data",
            )

    def sha256(self) -> str:
        """In hex; reads all of it once."""
        digest = hashlib.sha256()
        for at in range(0, self.size, _PIECE):
            digest.update(self.read(at, _PIECE))
        return digest.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset`` on, fewer at the end only."""
        wanted = min(size, self.size - offset)
        try:
            self._file.seek(offset)
            found = self._file.read(wanted)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if len(found) < wanted:
            raise DataError(
                f"{self.name} has become shorter than {self.size} bytes while it was read: submit it again when "
                "nothing writes to it",
                code="unreadable_file",
                param="data",
            )
        return found

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DataSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _spool(rows: Iterable[Mapping[str, Any]]) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  (DataSource closes it)
    for row in rows:
        file.write(orjson.dumps(row) + b"\n")
    return file


def _unreadable(name: Path | str, error: OSError) -> DataError:
    return DataError(f"{name} cannot be read: {error.strerror}", code="unreadable_file", param="data")

"""Training data on the client's side, read piece by piece: never in memory as a whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from sglang_harli.client import data_folder
from sglang_harli.errors import DataError
from sglang_harli.protocol import public
from sglang_harli.protocol.rows import odd_values

Data = str | os.PathLike[str] | bytes | Iterable[Mapping[str, Any]]
SPOOL_BYTES = 8 << 20  # rows beyond that go to a temporary file
_PIECE = 1 << 20


class DataSource:
    """The bytes of one submit.

    Args:
        data: path of a file (docs/data.md has the kinds), or of a folder of Parquet files or saved
            by ``datasets``, which becomes JSONL; the bytes of a file; or rows.

    Attributes:
        name: how the job calls it; ``size``: in bytes.

    Raises:
        DataError: it cannot be read, or is larger than a submit may be.
    """

    def __init__(self, data: Data) -> None:
        self._file: BinaryIO
        if isinstance(data, bytes | bytearray | memoryview):
            self.name, self._file = "data.jsonl", io.BytesIO(data)
        elif isinstance(data, str | os.PathLike) and _is_folder(data):
            name = as_text(os.fspath(data)).rstrip("/")
            self.name, self._file = f"{Path(name).name}.jsonl", data_folder.spool(Path(data), name)
        elif isinstance(data, str | os.PathLike):
            self.name, self._file = as_text(Path(data).name), open_file(data)
        else:
            self.name, self._file = "rows.jsonl", _spool(data)
        self.size = self._file.seek(0, os.SEEK_END)
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
            raise _unreadable(f"{self.name} cannot be read: {error.strerror or error}") from error
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


def _is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder of rows."""
    try:
        return os.path.isdir(path) and data_folder.is_data(Path(path))
    except (OSError, ValueError):
        return False


def as_text(name: str) -> str:
    """A file's name as text in UTF-8: bytes that are none in the form ``\\xe9``."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # it is no name of this system at all
        return name.encode("utf-8", "backslashreplace").decode()


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A file of training data.

    Raises:
        DataError: it is not there, cannot be read, or is no file that can be read twice.
    """
    name = as_text(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
        for is_kind, what in _KINDS:
            if is_kind(mode):
                raise _unreadable(f"{name} is {what}: give a file (data are read more than once)")
        return open(path, "rb")
    except OSError as error:
        hint = " (standard input is not read: give a file)" if name == "-" else ""
        raise _unreadable(f"{name} cannot be read: {error.strerror or error}{hint}") from error
    except ValueError as error:  # a null character
        raise _unreadable(f"{name!r} cannot be read: {error}") from error


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _spool(rows: Iterable[Mapping[str, Any]]) -> Any:
    if isinstance(rows, Mapping):
        raise DataError("the data are one object: give a list of rows", param="data")
    file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  (DataSource closes it)
    try:
        for number, row in enumerate(rows, 1):
            file.write(_row(row, number) + b"\n")
    except BaseException:
        file.close()
        raise
    return file


def _row(row: Any, number: int) -> bytes:
    """As a line of a JSONL file.

    Raises:
        DataError: it has a value that JSON has not; names the row (from 1) and the field.
    """
    odd = odd_values.odd_value(row)
    if odd is not None:
        path, problem = odd
        raise _bad_row(number, f"{odd_values.place(path)} {problem}")
    try:
        return orjson.dumps(row)
    except TypeError as first:
        try:  # orjson writes no integer of more than 64 bits
            return json.dumps(row, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            where = next((p for p, v in odd_values.fields_of(row) if not isinstance(v, _JSON)), None)
            about = f"{odd_values.place(where)} is no JSON value" if where else "it is no JSON value"
            reason = first if isinstance(error, RecursionError) else error
            raise _bad_row(number, f"{about} ({reason})") from error


_JSON = (str, int, float, bool, dict, list, tuple, type(None))


def _bad_row(number: int, reason: str) -> DataError:
    row = {"line": number, "field": None, "reason": reason}
    return DataError(f"rows.jsonl: row {number} is not accepted: {reason}", param="data", details=[row])


def _unreadable(message: str) -> DataError:
    return DataError(message, code="unreadable_file", param="data")

"""A job's tokens on disk: written row by row, read by offset.

``ids.npy`` int32 and ``targets.npy`` bool are flat over all rows; ``rows.npz`` has ``offsets``
(int64, rows + 1), ``target_tokens`` (int32, after the shift) and ``lines`` (int32).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sglang_harli.failpoints import WriteFailpoint, failpoint
from sglang_harli.service.rows.row import Row


class _FlatFile:
    """A 1-D .npy whose length is known at the end only (numpy pads the header for it)."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self.count = 0
        self._header()

    def _header(self) -> None:
        self._file.seek(0)
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def append(self, values: list[int] | list[bool]) -> None:
        self._file.write(np.asarray(values, dtype=self._dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        self._header()
        self._file.close()


class TokenWriter:
    """Context manager that writes rows into ``folder``; raises OSError: the disk is full."""

    def __init__(self, folder: Path) -> None:
        failpoint(WriteFailpoint.TOKENS)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ids = _FlatFile(folder / "ids.npy", np.int32)
        self._targets = _FlatFile(folder / "targets.npy", np.bool_)
        self._offsets = array("q", [0])
        self._target_tokens = array("i")
        self._lines = array("i")

    def append(self, row: Row, line: int) -> None:
        self._ids.append(row.ids)
        self._targets.append(row.targets)
        self._offsets.append(self._ids.count)
        self._target_tokens.append(row.target_tokens)
        self._lines.append(line)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()
        self._targets.close()
        if kind is None:
            np.savez(
                self._folder / "rows.npz",
                offsets=np.frombuffer(self._offsets, dtype=np.int64),
                target_tokens=np.asarray(self._target_tokens, dtype=np.int32),
                lines=np.asarray(self._lines, dtype=np.int32),
            )


class _FlatReader:
    """Reads slices of what ``_FlatFile`` wrote by ``pread``.  Not by a memory map: a file that is
    cut off under one kills the process by SIGBUS."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("rb", buffering=0)
        try:
            if np.lib.format.read_magic(self._file) != (1, 0):
                raise ValueError(f"{path}: not the .npy format 1.0")
            shape, _, found = np.lib.format.read_array_header_1_0(self._file)
            if found != self._dtype or len(shape) != 1:
                raise ValueError(f"{path}: holds {found} of shape {shape}, not a row of {self._dtype}")
            self.count: int = shape[0]
            self._start = self._file.tell()
            if os.fstat(self._file.fileno()).st_size < self._start + self.count * self._dtype.itemsize:
                raise ValueError(f"{path}: the file is shorter than the {self.count} values that it names")
        except BaseException:
            self._file.close()
            raise

    def slice(self, start: int, end: int) -> np.ndarray:
        """Values ``start`` up to ``end``; OSError where the file does not hold them."""
        size = self._dtype.itemsize
        at, wanted = self._start + start * size, (end - start) * size
        parts = bytearray()
        while len(parts) < wanted:
            part = os.pread(self._file.fileno(), wanted - len(parts), at + len(parts))
            if not part:
                raise OSError(f"{self._path}: ends at byte {at + len(parts)}: it was cut off while in use")
            parts += part
        return np.frombuffer(parts, dtype=self._dtype)

    def close(self) -> None:
        self._file.close()


class TokenReader:
    """Random access to the rows in ``folder``; its two files stay open until ``close``.  Raises
    OSError or ValueError, also at ``row``: a file is missing, cut off or not of TokenWriter."""

    def __init__(self, folder: Path) -> None:
        with ExitStack() as opened:
            self._ids = _FlatReader(folder / "ids.npy", np.int32)
            opened.callback(self._ids.close)
            self._targets = _FlatReader(folder / "targets.npy", np.bool_)
            opened.callback(self._targets.close)
            self.offsets, self.target_tokens, self.lines = _read_rows(folder / "rows.npz")
            total = int(self.offsets[-1])
            if self._ids.count != total or self._targets.count != total:
                raise ValueError(
                    f"{folder}: ids.npy and targets.npy do not hold the {total} tokens of rows.npz"
                )
            opened.pop_all()

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels (-100 where nothing is learned) of a row, int32, not shifted."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = self._ids.slice(start, end)
        return ids, np.where(self._targets.slice(start, end), ids, np.int32(-100))

    def close(self) -> None:
        self._ids.close()
        self._targets.close()


def _read_rows(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offsets, target_tokens and lines, which fit each other."""
    try:
        with np.load(path) as rows:
            offsets, target_tokens, lines = rows["offsets"], rows["target_tokens"], rows["lines"]
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not what was written ({error})") from error
    if not len(offsets) == len(target_tokens) + 1 == len(lines) + 1:
        raise ValueError(f"{path}: its arrays do not fit each other")
    return offsets, target_tokens, lines

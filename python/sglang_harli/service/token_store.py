"""A job's tokens on disk: written row by row, read by memory map.

``ids.npy`` int32 and ``targets.npy`` bool, both flat over all rows; ``rows.npz`` with ``offsets`` (int64,
rows + 1 values), ``target_tokens`` (int32, after the shift) and ``lines`` (int32) of each row.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sglang_harli.fault_points import Write, reach
from sglang_harli.service.chat_rows import Row


class _FlatFile:
    """A one-dimensional .npy of a length that is known at the end only (numpy pads the header for it)."""

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
    """Rows into ``folder``; a context manager.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        reach(Write.TOKENS)
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


class TokenReader:
    """Random access to the rows in ``folder``.

    Raises:
        OSError, ValueError: a file is missing or is not what TokenWriter wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._ids = np.load(folder / "ids.npy", mmap_mode="r")
        self._targets = np.load(folder / "targets.npy", mmap_mode="r")
        with np.load(folder / "rows.npz") as rows:
            self.offsets: np.ndarray = rows["offsets"]
            self.target_tokens: np.ndarray = rows["target_tokens"]
            self.lines: np.ndarray = rows["lines"]
        total = int(self.offsets[-1])
        if self._ids.shape != (total,) or self._targets.shape != (total,):
            raise ValueError(f"{folder}: ids.npy and targets.npy do not hold the {total} tokens of rows.npz")

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels (-100 where nothing is learned) of a row, int32, each at its own position."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = np.asarray(self._ids[start:end])
        return ids, np.where(self._targets[start:end], ids, np.int32(-100))

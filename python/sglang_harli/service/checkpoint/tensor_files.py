"""Safetensors files written, read and checked piece by piece, slowly enough for serving.

A decode step runs on all cores and waits for its slowest thread, so hashing and writing much at
once shows as a gap between tokens (docs/internals/run-protocol.md).  The library writes a file
whole and holds it in memory twice, hence the writing here; reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import SlotRef
from sglang_harli.service.pacing import Pace

PIECE = 1 << 18  # bytes worked on between two looks at the clock
SYNC_EVERY = 2 << 20  # bytes: what is dirty goes to the disk in small parts too
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to be written: its dtype by numpy's name, its bytes by ``load`` at its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write(path: Path, sources: Sequence[Source], pace: Pace) -> str:
    """Write a safetensors file, durable but for the folder's entry; its sha256.  Raises OSError."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        dirty = 0
        for piece in _pieces(sources):
            digest.update(piece)
            at = 0
            while at < len(piece):  # a raw write may take less than it is given
                at += file.write(piece[at:])
            dirty += len(piece)
            if dirty >= SYNC_EVERY:
                os.fdatasync(file.fileno())
                dirty = 0
            pace.rest()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(sources: Sequence[Source]) -> Iterator[memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in sources:
        end = offset + source.nbytes
        about = {"dtype": _DTYPES[source.dtype], "shape": source.shape, "data_offsets": [offset, end]}
        header[source.name] = about
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for source in sources:
        data = memoryview(source.load()).cast("B")
        if len(data) != source.nbytes:
            raise ValueError(f"{source.name} has {len(data)} bytes, its shape {source.shape} {source.nbytes}")
        yield from (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def from_slot(slot: shared_memory.SharedBuffer, ref: SlotRef) -> list[Source]:
    """The tensors in a mapped slot."""
    return [Source(t.name, t.dtype, tuple(t.shape), lambda t=t: slot.view(t)) for t in ref.tensors]


def digest(path: Path, pace: Pace) -> str:
    """The sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            found.update(piece)
            pace.rest()
    return found.hexdigest()


def into_slot(path: Path, folder: Path, pace: Pace) -> tuple[shared_memory.SharedBuffer, SlotRef]:
    """The tensors of a file in a new slot in ``folder``.  Raises OSError: shared memory is full, or
    the file is gone; safetensors.SafetensorError."""
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        kinds = {name: np.dtype(_NAMES[piece.get_dtype()]) for name, piece in slices.items()}
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        sizes = {n: int(np.prod(shapes[n], dtype=np.int64)) * kinds[n].itemsize for n in names}
        refs, nbytes = shared_memory.layout((n, kinds[n].name, shapes[n], sizes[n]) for n in names)
        slot = shared_memory.SharedBuffer.create(folder, nbytes, pace.rest)
        try:
            for ref in refs:
                place = np.frombuffer(slot.view(ref), dtype=kinds[ref.name]).reshape(ref.shape)
                place[...] = file.get_tensor(ref.name)
                del place
                pace.rest()
        except BaseException:
            slot.unlink()
            raise
    return slot, slot.ref(refs)


_NAMES = {short: name for name, short in _DTYPES.items()}

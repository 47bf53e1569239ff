"""Slots: files in /dev/shm that carry tensors between processes without a copy through a socket.

The maker (always the finetune service) creates and faults the pages in; the scheduler maps the file
and copies tensor by tensor.  Plain mmap instead of multiprocessing.shared_memory, whose resource
tracker would unlink a slot when any one process ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sglang_harli.fault_points import Write, reach
from sglang_harli.protocol.internal import SlotRef, TensorRef

_ALIGN = 64
_PART = 4 << 20  # bytes of a slot that are made at a time


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> tuple[list[TensorRef], int]:
    """Places for (name, dtype, shape, nbytes), 64-byte aligned, and the total size in bytes."""
    refs: list[TensorRef] = []
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        refs.append(TensorRef(name, dtype, tuple(shape), offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return refs, max(offset, _ALIGN)


class Slot:
    """A mapped slot.  ``buffer`` is a writable memoryview over the whole file.

    Raises:
        OSError: shared memory is full (creating) or the file is gone (opening).
    """

    def __init__(
        self, path: str, nbytes: int, *, create: bool, rest: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self.nbytes = nbytes
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                _check_room(fd, nbytes)
                for start in range(0, nbytes, _PART):  # a full /dev/shm is an error here, not a SIGBUS later
                    os.posix_fallocate(fd, start, min(_PART, nbytes - start))
                    rest()
            elif os.fstat(fd).st_size < nbytes:
                raise OSError(f"slot {path} is shorter than the {nbytes} bytes it should have")
            self.map = mmap.mmap(fd, nbytes)
        except BaseException:
            if create:
                os.unlink(path)
            raise
        finally:
            os.close(fd)
        self.buffer = memoryview(self.map)

    @classmethod
    def create(cls, folder: Path, nbytes: int, rest: Callable[[], None] = lambda: None) -> Slot:
        """A new slot in ``folder`` (made with mode 0700), its pages faulted in; ``rest`` is called in between."""
        reach(Write.SLOT)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        slot = cls(str(folder / f"slot-{secrets.token_hex(8)}"), nbytes, create=True, rest=rest)
        pages = np.frombuffer(slot.buffer, dtype=np.uint8)
        for start in range(0, nbytes, _PART):
            pages[start : start + _PART : mmap.PAGESIZE] = 0
            rest()
        return slot

    @classmethod
    def open(cls, ref: SlotRef) -> Slot:
        return cls(ref.path, ref.nbytes, create=False)

    def ref(self, tensors: list[TensorRef] | None = None) -> SlotRef:
        return SlotRef(path=self.path, nbytes=self.nbytes, tensors=tensors or [])

    def view(self, tensor: TensorRef) -> memoryview:
        """The tensor's bytes in the slot (writable)."""
        return self.buffer[tensor.offset : tensor.offset + tensor.nbytes]

    def close(self) -> None:
        """Unmap; views must be gone (a numpy or torch view keeps the map alive until it dies)."""
        try:
            self.buffer.release()
            self.map.close()
        except BufferError:
            pass  # a view is still alive: the map goes with its last view

    def unlink(self) -> None:
        self.close()
        Path(self.path).unlink(missing_ok=True)


def _check_room(fd: int, nbytes: int) -> None:
    """Refuse what cannot fit before its first part is taken from everybody else."""
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    if nbytes > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {nbytes} bytes wanted, {free} free")


def remove_stale(folder: Path) -> None:
    """Remove the slots that a killed server of this run directory left behind."""
    if folder.is_dir():
        for path in folder.glob("slot-*"):
            path.unlink(missing_ok=True)

"""Slots: files in /dev/shm that carry tensors between processes without a copy through a socket.

The finetune service creates one and faults the pages in; the scheduler maps the file and copies
tensor by tensor.  Plain mmap: the resource tracker of multiprocessing.shared_memory would unlink a
slot when any one process ends.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sglang_harli import run_paths
from sglang_harli.failpoints import WriteFailpoint, failpoint
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


class SharedBufferError(OSError):
    """A slot cannot be made or opened: why, and what to do where it is not for lack of memory."""


def passes(error: OSError | MemoryError) -> bool:
    """Whether a slot may be made later: not one larger than all of shared memory."""
    return isinstance(error, MemoryError) or error.errno != errno.EFBIG


def refusal(what: str, error: OSError | MemoryError) -> str:
    """Why there is no slot for ``what``, and what to do: one sentence."""
    if isinstance(error, MemoryError) or error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        return f"shared memory has no room for {what} ({error}): make room in /dev/shm"
    if error.errno == errno.EFBIG:
        return f"shared memory is too small for {what} ({error}): give /dev/shm more, or lower lora_r"
    return f"shared memory cannot be used for {what}: {error}"


class SharedBuffer:
    """A mapped slot; ``buffer`` is a writable memoryview over the file.  SharedBufferError: shared
    memory is full (creating), the file is gone (opening), or it is not this user's alone."""

    def __init__(
        self, path: str, nbytes: int, *, create: bool, rest: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self.nbytes = nbytes
        folder, name = os.path.split(path)
        try:
            at = run_paths.open_private(Path(folder))
            try:
                self.map = _create(at, name, nbytes, rest) if create else _open(at, name, nbytes)
            finally:
                os.close(at)
        except OSError as error:
            raise _slot_error(error, path) from error
        self.buffer = memoryview(self.map)

    @classmethod
    def create(cls, folder: Path, nbytes: int, rest: Callable[[], None] = lambda: None) -> SharedBuffer:
        """A new slot in ``folder`` (mode 0700), faulted in; ``rest`` is called in between."""
        try:
            failpoint(WriteFailpoint.SLOT)
            os.close(run_paths.open_private(folder, make=True))
        except OSError as error:
            raise _slot_error(error, folder) from error
        slot = cls(str(folder / f"slot-{secrets.token_hex(8)}"), nbytes, create=True, rest=rest)
        pages = np.frombuffer(slot.buffer, dtype=np.uint8)
        for start in range(0, nbytes, _PART):
            pages[start : start + _PART : mmap.PAGESIZE] = 0
            rest()
        return slot

    @classmethod
    def open(cls, ref: SlotRef) -> SharedBuffer:
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


def _slot_error(error: OSError, path: str | Path) -> SharedBufferError:
    if error.errno is None:
        return SharedBufferError(str(error))
    return SharedBufferError(error.errno, f"{error.strerror} ({path})")


def _create(at: int, name: str, nbytes: int, rest: Callable[[], None]) -> mmap.mmap:
    """``at``: descriptor of the folder."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=at)
    try:
        _check_room(fd, nbytes)
        for start in range(0, nbytes, _PART):  # a full /dev/shm is an error here, not a SIGBUS later
            os.posix_fallocate(fd, start, min(_PART, nbytes - start))
            rest()
        return mmap.mmap(fd, nbytes)
    except BaseException:
        os.unlink(name, dir_fd=at)
        raise
    finally:
        os.close(fd)


def _open(at: int, name: str, nbytes: int) -> mmap.mmap:
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise PermissionError(f"slot {name} is not a file of uid {os.getuid()} with mode 0600")
        if info.st_size < nbytes:
            raise OSError(f"slot {name} is shorter than the {nbytes} bytes it should have")
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)


def _check_room(fd: int, nbytes: int) -> None:
    """Refuse what cannot fit before its first part is taken from everybody else."""
    disk = os.fstatvfs(fd)
    free, most = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if nbytes > most:
        raise OSError(errno.EFBIG, f"{nbytes} bytes wanted, {most} there are in all")
    if nbytes > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {nbytes} bytes wanted, {free} free")


def stale(folder: Path) -> list[Path]:
    """The slots in ``folder``, if that is this user's alone."""
    try:
        os.close(run_paths.open_private(folder))
    except OSError:
        return []
    return sorted(folder.glob("slot-*"))


def remove_stale(folder: Path) -> None:
    """Remove the slots of a server of this run directory that is no more, and their folder."""
    for path in stale(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()  # a link or another user's stays

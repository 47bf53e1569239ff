"""The pool's memory on a host: two anonymous mappings, one for the KV buffers and one for training.

A lent page falls out of the KV mapping (``MADV_DONTNEED``), and the training mapping faults in a
fresh one when it is written: the physical memory of both stays within the budget, and the resident
size falls when memory is given away unused. The KV mapping is populated from the start, as SGLang's
own pool is by its zeros: else the first requests would wait for the kernel.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.intervals import IntervalAllocator
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of

POISON = 0xFF  # a byte: repeated, it is NaN in 16-, 32- and 64-bit floating point
WINDOW_SHARE = 2  # address space of the training mapping, times what can be lent: room against fragmentation
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # x86 and Arm; Python 3.13 names it


class HostBacking:
    """The pool's memory as anonymous mappings on the host.

    ``debug``: memory on its way to training, and the KV rows that it leaves, are filled with NaN.

    Raises:
        ValueError: chunks are not whole OS pages.
    """

    name = "host"
    contiguous = True

    def __init__(self, geometry: PoolGeometry, *, debug: bool = False) -> None:
        if geometry.chunk_bytes % mmap.PAGESIZE:
            raise ValueError(
                f"a chunk of {geometry.chunk_bytes} bytes is not whole pages of {mmap.PAGESIZE}: "
                f"plan the geometry with granularity={mmap.PAGESIZE}"
            )
        self.geometry, self.debug = geometry, debug
        self._stride = geometry.value_offset(mmap.PAGESIZE)  # from buffer to buffer
        lendable = len(geometry.lendable)
        self._kv = _Region(self._stride * geometry.buffers)
        self._kv.populate()
        self._window = _Region(max(WINDOW_SHARE * lendable * geometry.stripe_bytes, mmap.PAGESIZE))
        self._places = IntervalAllocator(WINDOW_SHARE * lendable)  # of the window, in stripes
        self._lent: dict[int, tuple[int, ...]] = {}  # place in the window -> stripes

    @property
    def lent(self) -> set[int]:
        return {stripe for stripes in self._lent.values() for stripe in stripes}

    def kv_bytes(self, buffer: int) -> Tensor:
        """Buffer's bytes, uint8 ``[buffer_bytes]``; zero until they are written."""
        return self._kv.bytes.narrow(0, buffer * self._stride, self.geometry.buffer_bytes)

    def extent_bytes(self, stripes: Sequence[int]) -> list[int]:
        return [len(stripes) * self.geometry.stripe_bytes]

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """One extent of the training mapping; MemoryError: its free places are too scattered."""
        place = self._places.allocate(len(stripes))
        if place is None:
            raise MemoryError(
                f"no place of {len(stripes)} stripes in a row in the training mapping, though "
                f"{self._places.free} are free: let training give back leases"
            )
        stripe_bytes = self.geometry.stripe_bytes
        extent = self._window.bytes.narrow(0, place * stripe_bytes, len(stripes) * stripe_bytes)
        for start, length in self._kv_ranges(stripes):
            if self.debug:
                self._kv.bytes.narrow(0, start, length).fill_(POISON)
            else:
                self._kv.discard(start, length)
        if self.debug:
            extent.fill_(POISON)
        self._lent[place] = tuple(stripes)
        return [extent]

    def take_back(self, stripes: Sequence[int], extents: Sequence[Tensor]) -> None:
        """Both sides lose their memory: the KV rows fault in as zeros, even after stray writes."""
        (extent,) = extents
        start = int(extent.storage_offset())
        del self._lent[start // self.geometry.stripe_bytes]
        self._window.discard(start, extent.numel())
        self._places.release(start // self.geometry.stripe_bytes, len(stripes))
        for kv_start, length in self._kv_ranges(stripes):
            self._kv.discard(kv_start, length)

    def settle(self) -> None:
        """Nothing is under way: the kernel's calls are over when they return."""

    def _kv_ranges(self, stripes: Sequence[int]) -> list[tuple[int, int]]:
        """(start, length) in the KV mapping: one for each buffer and run of adjacent stripes."""
        chunk = self.geometry.chunk_bytes
        return [
            (buffer * self._stride + run.start * chunk, len(run) * chunk)
            for run in runs_of(stripes)
            for buffer in range(self.geometry.buffers)
        ]

    def resident_bytes(self) -> int:
        """Physical memory of both mappings, as the kernel's ``mincore`` says.

        ``/proc/self/smaps`` would list all mappings, and may join ours with others. A page that was
        read and never written counts, although it is the shared zero page.
        """
        return self._kv.resident_bytes() + self._window.resident_bytes()

    def close(self) -> None:
        """Return all physical memory; the address space goes with the last tensor over it."""
        self._kv.discard(0, len(self._kv.map))
        self._window.discard(0, len(self._window.map))


class _Region:
    """An anonymous, private mapping; ``bytes`` (uint8 over all of ``map``) keeps it alive."""

    def __init__(self, nbytes: int) -> None:
        # Reserve nothing: the two mappings together are larger than the memory that they ever hold.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.map = mmap.mmap(-1, nbytes, flags=flags)
        # A huge page across a chunk's border stays whole until split; some kernels have none.
        with suppress(OSError):
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def populate(self) -> None:
        """Have all of it in memory, which holds zeros."""
        try:
            self.map.madvise(MADV_POPULATE_WRITE)
        except OSError:  # an older kernel
            self.bytes.fill_(0)

    def discard(self, start: int, length: int) -> None:
        """The range holds zeros and no memory."""
        self.map.madvise(mmap.MADV_DONTNEED, start, length)

    def resident_bytes(self) -> int:
        pages = -(-len(self.map) // mmap.PAGESIZE)
        present = torch.empty(pages, dtype=torch.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(self.bytes.data_ptr()),
            ctypes.c_size_t(len(self.map)),
            ctypes.c_void_p(present.data_ptr()),
        )
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
        return int(present.bitwise_and_(1).sum(dtype=torch.int64)) * mmap.PAGESIZE

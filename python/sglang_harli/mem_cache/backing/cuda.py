"""The pool's memory on CUDA, remapped: chunks lie here or there (docs/internals/memory.md).

    layer       | K: chunk 0 | chunk 1 | scratch | scratch | chunk 4 | tail | V: ...   one range per layer
    window      | ... 2 of K0 | 2 of V0 | ... 3 of K0 | 3 of V0 | ...             one range for training

Lending maps a stripe's chunks one behind the other into training's window, and in their place one
scratch chunk that all lent rows share: a stray read past a sequence's end finds finite numbers and
never faults. No address changes, so CUDA graphs and attention kernels stay valid.

The driver's map and unmap are not ordered with streams: both ways the host first waits for the
events of every stream that may touch the range (at most the rest of one batch or quantum; the
device is not drained). That also orders training's first write behind the last write of a forward
to a slot that was freed while it ran. Where stray reads do no harm, ``AliasedBacking`` does
without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from sglang_harli.mem_cache.backing.device_memory import NAN_BYTE, DeviceMemory, Undo, rounding_bytes
from sglang_harli.mem_cache.backing.intervals import IntervalAllocator
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of

WINDOW_FACTOR = 4  # training's addresses per lendable byte: leaves gaps of every length


class BrokenPoolError(DriverError):
    """A call failed and could not be undone: it is not known what is mapped where."""

    code = "pool_broken"


class CudaBacking(DeviceMemory):
    """The pool's memory as physical handles that are mapped here or there.

    See ``DeviceMemory``; ``debug``: memory on its way to training, and what is read through lent
    rows, is NaN.
    """

    name = "remapped"
    contiguous = True

    def __init__(self, geometry: PoolGeometry, *args: Any, **kwargs: Any) -> None:
        self._window = IntervalAllocator(WINDOW_FACTOR * len(geometry.lendable))  # in stripes
        self._window_base = 0
        self._lent: dict[int, tuple[int, ...]] = {}  # address in the window -> stripes, as they lie there
        self._broken: str | None = None
        super().__init__(geometry, *args, **kwargs)

    def _map_window(self) -> None:
        if self._window.size:
            self._window_base = self._reserve(self._window.size * self.geometry.stripe_bytes)

    def _map_scratch(self) -> None:
        geometry = self.geometry
        self._scratch = self._create(geometry.chunk_bytes)
        at = self._reserve(geometry.chunk_bytes)  # an address of its own, where scratch can be written
        self._map(at, [self._scratch], self._teardown)
        self._order.fill([(at, geometry.chunk_bytes)], NAN_BYTE if self._debug else 0)

    @property
    def lent(self) -> set[int]:
        return {stripe for stripes in self._lent.values() for stripe in stripes}

    def extent_bytes(self, stripes: Sequence[int]) -> list[int]:
        return [self._bytes_of(stripes)]

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """See ``Backing``. One extent: each stripe's chunks in the order of the buffers.

        Raises:
            MemoryError: no gap in training's addresses, or the driver refused; nothing was moved.
            BrokenPoolError: what was done before the refusal could not be undone: restart the
                server.
        """
        self._check(stripes)
        self._order.fence()
        place = self._window.allocate(len(stripes))
        if place is None:
            raise MemoryError(f"no gap of {len(stripes)} stripes in training's {self._window.size}")
        at, nbytes = self._window_base + place * self.geometry.stripe_bytes, self._bytes_of(stripes)
        try:
            with self._all_or_nothing() as undo:
                self._map(at, self._in_window(stripes), undo)
                for address, chunks in self._rows(stripes):
                    self._replace(address, chunks, [self._scratch] * len(chunks), undo)
                extent = self._driver.tensor(at, nbytes)
                if self._debug:  # last: what is undone is the KV cache's again, and holds finite numbers
                    self._fill([(at, nbytes)], NAN_BYTE)
        except BrokenPoolError:
            raise
        except DriverError as error:
            self._window.release(place, len(stripes))
            raise MemoryError(error.message) from error
        self._lent[at] = tuple(stripes)
        return [extent]

    def take_back(self, stripes: Sequence[int], extents: Sequence[Tensor]) -> None:
        """See ``Backing``.

        Raises:
            ValueError: not one whole earlier ``lend``.
            DriverError: the driver refused; the memory is still lent, its contents undefined.
            BrokenPoolError: nor could that be undone: the server must be restarted.
        """
        self._check_whole()
        at = extents[0].data_ptr() if len(extents) == 1 else 0
        if self._lent.get(at) != tuple(stripes):
            raise ValueError(f"stripes {list(stripes)} were not lent together as one extent at {at:#x}")
        self._order.fence()
        size = self.geometry.chunk_bytes
        with self._all_or_nothing() as undo:
            rows = self._rows(stripes)
            for address, chunks in rows:
                self._replace(address, [self._scratch] * len(chunks), chunks, undo)
            self._unmap(at, self._in_window(stripes), undo)
            self._fill([(address, len(chunks) * size) for address, chunks in rows], 0)
        self._window.release((at - self._window_base) // self.geometry.stripe_bytes, len(stripes))
        del self._lent[at]

    def _bytes_of(self, stripes: Sequence[int]) -> int:
        return len(stripes) * self.geometry.stripe_bytes

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise BrokenPoolError(self._broken)
        super()._check_whole()

    def _rows(self, stripes: Sequence[int]) -> list[tuple[int, list[int]]]:
        """For each buffer and run of adjacent stripes: the run's address and its own handles."""
        size, runs = self.geometry.chunk_bytes, runs_of(stripes)
        return [
            (base + run.start * size, chunks[run.start : run.stop])
            for base, chunks in zip(self._bases, self._chunks, strict=True)
            for run in runs
        ]

    def _in_window(self, stripes: Sequence[int]) -> list[int]:
        """Their handles in the order in which they lie in the window."""
        return [chunks[stripe] for stripe in stripes for chunks in self._chunks]

    def _replace(self, address: int, old: Sequence[int], new: Sequence[int], undo: Undo) -> None:
        self._unmap(address, old, undo)
        self._map(address, new, undo)

    def _unmap(self, address: int, handles: Sequence[int], undo: Undo) -> None:
        """Unmap a row of chunks (``handles``) from this address on, by one call."""
        self._driver.unmap(address, len(handles) * self.geometry.chunk_bytes)
        undo.append(partial(self._map, address, handles, []))

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[Undo]:
        """A block whose steps are undone, last first, when the driver refuses one of them."""
        undo: Undo = []
        try:
            yield undo
        except DriverError as error:
            try:
                self._order.fence()  # of memory that was being cleared
                for step in reversed(undo):
                    step()
            except DriverError as second:
                self._broken = (
                    f"moving the pool's memory failed ({error.message}) and could not be undone "
                    f"({second.message}): restart the server"
                )
                raise BrokenPoolError(self._broken) from error
            raise

    def _fill(self, ranges: Sequence[tuple[int, int]], value: int) -> None:
        """Fill (address, bytes); all that any of the streams is given later comes after it."""
        self._order.fill(ranges, value)
        self._order.spread()

    def _unmap_lent(self) -> None:
        for at, stripes in self._lent.items():
            self._driver.unmap(at, self._bytes_of(stripes))
        self._lent = {}


def overhead_bytes(geometry: PoolGeometry, granularity: int) -> int:
    """Device memory beyond the pool's budget: the scratch chunk and the rounding of the tails."""
    return geometry.chunk_bytes + rounding_bytes(geometry, granularity)

"""The pool's memory on CUDA, each chunk mapped twice for ever (docs/internals/memory.md).

    layer     | K: chunk 0 | chunk 1 | chunk 2 | ...    | V: chunk 0 | ...       one range per layer
    window    | 1 of K0 | 1 of V0 | 1 of K1 | ... | 2 of K0 | 2 of V0 | ...      one range for training

In the window the stripes lie in their order, and each stripe's chunks in the order of the buffers:
adjacent stripes are one extent. Lending is accounting, and giving back a fill; between them nothing
is mapped, unmapped or waited for, and no address ever changes. What orders both is events: the
stream of forwards and training waits for every other stream before a lease is used and before its
memory is cleared, and every other stream for the clearing. So a forward in flight has written its
last to a slot that was freed under it before training has that slot.

The CUDA C++ Programming Guide ("Virtual Aliasing Support") has one rule for memory at two
addresses: what one operation writes through one of them is read through the other by operations
that begin after it has ended. Therefore memory is cleared by the driver's memset, never by a
kernel: one that was launched as programmatically dependent could begin before that has ended.

Lent rows hold training's bits, which as bfloat16 may be NaN: a read of them that is not masked, in
K or in V, is not harmless. ``stray_reads`` says of which attention kernels that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sglang_harli.errors import HarliError
from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from sglang_harli.mem_cache.backing.device_memory import NAN_BYTE, DeviceMemory
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of


class UnclearedError(HarliError, RuntimeError):
    """Memory that came back does not hold zeros: something still wrote to it (debug mode only)."""

    code = "pool_uncleared"


class AliasedBacking(DeviceMemory):
    """The pool's memory as physical handles, each mapped in its KV buffer and in training's window.

    See ``DeviceMemory``; ``debug``: memory on its way to training is NaN, and what comes back is
    looked at (the host waits for it).
    """

    name = "aliased"
    contiguous = False

    def __init__(self, geometry: PoolGeometry, *args: Any, **kwargs: Any) -> None:
        self._lent: set[int] = set()
        self._window: Tensor | None = None
        super().__init__(geometry, *args, **kwargs)

    def _map_window(self) -> None:
        geometry = self.geometry
        if not (nbytes := geometry.lendable_bytes):
            return
        base = self._reserve(nbytes)
        handles = [chunks[stripe] for stripe in geometry.lendable for chunks in self._chunks]
        self._map(base, handles, self._teardown)
        self._window_base, self._window = base, self._driver.tensor(base, nbytes)

    @property
    def lent(self) -> set[int]:
        return set(self._lent)

    def extent_bytes(self, stripes: Sequence[int]) -> list[int]:
        return [nbytes for _, nbytes in self._ranges(stripes)]

    def _ranges(self, stripes: Sequence[int]) -> list[tuple[int, int]]:
        """(offset in the window, bytes) of each run of adjacent stripes."""
        first, size = self.geometry.lendable.start, self.geometry.stripe_bytes
        return [((run.start - first) * size, len(run) * size) for run in runs_of(stripes)]

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """See ``Backing``. One extent for each run of adjacent stripes, lowest first.

        Raises:
            MemoryError: the driver refused an event; nothing is lent.
        """
        self._check(stripes)
        assert self._window is not None
        ranges = self._ranges(stripes)
        try:
            self._order.gather()
            if self._debug:
                self._order.fill(self._addresses(ranges), NAN_BYTE)
        except DriverError as error:
            raise MemoryError(error.message) from error
        self._lent |= set(stripes)
        return [self._window.narrow(0, start, nbytes) for start, nbytes in ranges]

    def take_back(self, stripes: Sequence[int], extents: Sequence[Tensor]) -> None:
        """See ``Backing``.

        Raises:
            ValueError: these are not the extents of stripes that are lent.
            DriverError: the driver refused; the memory is still lent, its contents undefined.
            UnclearedError: debug mode found other bytes than zeros.
        """
        self._check_whole()
        ranges = self._ranges(stripes)
        addresses = self._addresses(ranges)
        given = [(extent.data_ptr(), extent.nbytes) for extent in extents]
        if not stripes or not self._lent.issuperset(stripes) or given != addresses:
            raise ValueError(
                f"stripes {list(stripes)} were not lent as extents at {[hex(at) for at, _ in given]}"
            )
        self._order.gather()
        self._order.fill(addresses, 0)
        self._order.spread()
        self._lent -= set(stripes)
        if self._debug:
            self._check_cleared(stripes)

    def _addresses(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(self._window_base + start, nbytes) for start, nbytes in ranges]

    def _check_cleared(self, stripes: Sequence[int]) -> None:
        """Read the rows where forwards do."""
        self._order.fence()
        size = self.geometry.chunk_bytes
        for stripe in stripes:
            for buffer, rows in enumerate(self._kv):
                if rows.narrow(0, stripe * size, size).any():
                    raise UnclearedError(
                        f"stripe {stripe} came back with other bytes than zeros in buffer {buffer}: something still "
                        "writes to memory that was given back"
                    )

    def _unmap_lent(self) -> None:
        self._lent.clear()
        self._window = None

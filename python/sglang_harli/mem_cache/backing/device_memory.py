"""A pool's KV buffers as physical handles of the CUDA driver, and what both CUDA backings share.

    layer       | K: chunk 0 | chunk 1 | chunk 2 | ... | tail | V: ...     one range of addresses per layer

Ranges of addresses are reserved, handles created and KV chunks mapped once, at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.cuda_driver import Driver, DriverError
from sglang_harli.mem_cache.backing.stream_order import StreamOrder, Streams
from sglang_harli.mem_cache.geometry import PoolGeometry

NAN_BYTE = 0xFF  # NaN in every floating-point format of 16, 32 and 64 bits
Undo = list[Callable[[], object]]


class DeviceMemory:
    """The pool's KV buffers, mapped, and zero.

    Used from one thread, never while a CUDA graph is being captured.

    Args:
        geometry: planned with the driver's granularity.
        streams: see ``StreamOrder``.
        debug: what is given away is filled with NaN.

    Raises:
        DriverError: no memory for the pool, or the driver refuses.
        ValueError: a geometry whose chunks the driver cannot map.
    """

    def __init__(
        self,
        geometry: PoolGeometry,
        device: torch.device,
        driver: Driver,
        streams: Streams,
        *,
        debug: bool = False,
    ) -> None:
        if geometry.chunk_bytes % driver.granularity:
            raise ValueError(
                f"chunks of {geometry.chunk_bytes} bytes cannot be mapped: plan the pool with the granularity "
                f"{driver.granularity}"
            )
        self.geometry, self.device = geometry, device
        self._driver, self._debug = driver, debug
        self._order = StreamOrder(driver, streams)
        self._chunks: list[list[int]] = []  # handle of [buffer][stripe]
        self._bases: list[int] = []  # address of [buffer]
        self._kv: list[Tensor] = []
        self._physical = 0
        self._teardown: Undo = []
        try:
            self._build()
        except DriverError:
            self.close()
            raise

    @property
    def lent(self) -> set[int]:
        raise NotImplementedError

    def _build(self) -> None:
        """Map what the backing adds before and behind the KV buffers, and clear these."""
        geometry, driver = self.geometry, self._driver
        self._map_scratch()
        tail = tail_bytes(geometry, driver.granularity)
        to_value = geometry.value_offset(driver.granularity)
        nbytes = geometry.stripes * geometry.chunk_bytes + tail
        for buffer in range(geometry.buffers):
            chunks = [self._create(geometry.chunk_bytes) for _ in range(geometry.stripes)]
            is_value = buffer % 2 == 1
            base = self._bases[-1] + to_value if is_value else self._reserve(2 * to_value)
            self._map(base, chunks, self._teardown)
            if tail:
                self._map(base + nbytes - tail, [self._create(tail)], self._teardown, size=tail)
            self._chunks.append(chunks)
            self._bases.append(base)
        self._map_window()
        self._order.fill([(base, geometry.buffer_bytes) for base in self._bases], 0)
        self._order.fence()
        self._kv = [driver.tensor(base, geometry.buffer_bytes) for base in self._bases]

    def _map_scratch(self) -> None:
        """Map what KV places may be given for a while."""

    def _map_window(self) -> None:
        """Reserve training's addresses."""
        raise NotImplementedError

    def _create(self, nbytes: int) -> int:
        handle = self._driver.create(nbytes)
        self._teardown.append(partial(self._driver.release, handle))
        self._physical += nbytes
        return handle

    def _reserve(self, nbytes: int) -> int:
        address = self._driver.reserve(nbytes)
        self._teardown.append(partial(self._driver.free_address, address, nbytes))
        return address

    def _map(self, address: int, handles: Sequence[int], undo: Undo, *, size: int = 0) -> None:
        """Map handles of ``size`` bytes (a chunk) in a row; access is set once for all of them."""
        size = size or self.geometry.chunk_bytes
        for index, handle in enumerate(handles):
            self._driver.map(address + index * size, size, handle)
            undo.append(partial(self._driver.unmap, address + index * size, size))
        if handles:
            self._driver.set_access(address, len(handles) * size)

    def kv_bytes(self, buffer: int) -> Tensor:
        return self._kv[buffer]

    def settle(self) -> None:
        """See ``Backing``."""
        self._order.settle()

    def resident_bytes(self) -> int:
        """All handles: on CUDA memory never leaves the pool, it only changes its address."""
        return self._physical

    def _check(self, stripes: Sequence[int]) -> None:
        self._check_whole()
        away = self.lent
        wrong = [s for s in stripes if s not in self.geometry.lendable or s in away]
        if wrong or not stripes or len(set(stripes)) != len(stripes):
            lendable = self.geometry.lendable
            raise ValueError(
                f"cannot lend stripes {list(stripes)}: each once, from {lendable.start} to {lendable.stop - 1}, "
                f"and none of those that are lent ({sorted(away)})"
            )

    def _check_whole(self) -> None:
        if not self._kv:
            raise ValueError("the pool's memory was closed")

    def _unmap_lent(self) -> None:
        """Before everything is unmapped that was mapped at the start."""

    def close(self) -> None:
        """Return everything; may be repeated. The tensors handed out must not be used any more."""
        self._kv = []
        self._order.close()
        self._unmap_lent()
        while self._teardown:
            self._teardown.pop()()


def tail_bytes(geometry: PoolGeometry, granularity: int) -> int:
    """Bytes mapped behind the last whole stripe of a buffer: a multiple of the granularity."""
    return -(-(geometry.buffer_bytes - geometry.stripes * geometry.chunk_bytes) // granularity) * granularity


def rounding_bytes(geometry: PoolGeometry, granularity: int) -> int:
    """Device memory beyond the pool's budget for its tails."""
    mapped = geometry.stripes * geometry.chunk_bytes + tail_bytes(geometry, granularity)
    return geometry.buffers * (mapped - geometry.buffer_bytes)

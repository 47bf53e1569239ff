"""The pool's memory on CUDA: physical chunks mapped here or there (docs/internals/memory.md).

    layer       | K: chunk 0 | chunk 1 | scratch | scratch | chunk 4 | tail | V: ...   one range per layer
    window      | ... 2 of K0 | 2 of V0 | ... 3 of K0 | 3 of V0 | ...             one range for training

Ranges of addresses are reserved and handles created once. Lending maps a stripe's chunks one behind
the other into training's window, and in their place one scratch chunk that all lent rows share: a
stray read past a sequence's end finds finite numbers and never faults. No address changes, so CUDA
graphs and attention kernels stay valid.

The driver's map and unmap are not ordered with streams: both ways the host first waits for the
events of every stream that may touch the range (at most the rest of one batch or quantum; the
device is not drained). That also orders training's first write behind the last write of a forward
to a slot that was freed while it ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.cuda_driver import Driver, DriverError
from sglang_harli.mem_cache.backing.intervals import IntervalAllocator
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of

WINDOW_FACTOR = 4  # training's addresses per lendable byte: leaves gaps of every length
NAN_BYTE = 0xFF  # NaN in every floating-point format of 16, 32 and 64 bits
Undo = list[Callable[[], object]]


class BrokenPoolError(DriverError):
    """A call failed and could not be undone: it is not known what is mapped where."""

    code = "pool_broken"


class CudaBacking:
    """The pool's memory as physical handles that are mapped here or there.

    Used from one thread, never while a CUDA graph is being captured.

    Args:
        geometry: planned with the driver's granularity.
        streams: asked at every move: raw handles of all streams that may touch KV rows or leases.
            Forwards and training run on the first; memory is cleared on it.
        debug: memory on its way to training, and what is read through lent rows, is NaN.

    Raises:
        DriverError: no memory for the pool, or the driver refuses.
        ValueError: a geometry whose chunks the driver cannot map.
    """

    name = "cuda"
    contiguous = True

    def __init__(
        self,
        geometry: PoolGeometry,
        device: torch.device,
        driver: Driver,
        streams: Callable[[], Sequence[int]],
        *,
        debug: bool = False,
    ) -> None:
        if geometry.chunk_bytes % driver.granularity:
            raise ValueError(
                f"chunks of {geometry.chunk_bytes} bytes cannot be mapped: plan the pool with the granularity "
                f"{driver.granularity}"
            )
        self.geometry, self.device = geometry, device
        self._driver, self._streams, self._debug = driver, streams, debug
        self._window = IntervalAllocator(WINDOW_FACTOR * len(geometry.lendable))  # in stripes
        self._chunks: list[list[int]] = []  # handle of [buffer][stripe]
        self._bases: list[int] = []  # address of [buffer]
        self._kv: list[Tensor] = []
        self._lent: dict[int, tuple[int, ...]] = {}  # address in the window -> stripes, as they lie there
        self._events: dict[int, int] = {}  # stream -> its event
        self._physical = 0
        self._broken: str | None = None
        self._teardown: Undo = []
        try:
            self._build()
        except DriverError:
            self.close()
            raise

    def _build(self) -> None:
        geometry, driver = self.geometry, self._driver
        self._scratch = self._create(geometry.chunk_bytes)
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
        self._window_base = 0
        if self._window.size:
            self._window_base = self._reserve(self._window.size * geometry.stripe_bytes)
        self._clear_everything()
        self._kv = [driver.tensor(base, geometry.buffer_bytes) for base in self._bases]

    def _clear_everything(self) -> None:
        """KV rows start as zeros, as SGLang's do."""
        geometry = self.geometry
        at = self._reserve(geometry.chunk_bytes)  # an address of its own, where scratch can be written
        self._map(at, [self._scratch], self._teardown)
        self._fill([(at, geometry.chunk_bytes)], NAN_BYTE if self._debug else 0)
        self._fill([(base, geometry.buffer_bytes) for base in self._bases], 0)
        self._fence()

    def _create(self, nbytes: int) -> int:
        handle = self._driver.create(nbytes)
        self._teardown.append(partial(self._driver.release, handle))
        self._physical += nbytes
        return handle

    def _reserve(self, nbytes: int) -> int:
        address = self._driver.reserve(nbytes)
        self._teardown.append(partial(self._driver.free_address, address, nbytes))
        return address

    @property
    def lent(self) -> set[int]:
        return {stripe for stripes in self._lent.values() for stripe in stripes}

    def kv_bytes(self, buffer: int) -> Tensor:
        return self._kv[buffer]

    def resident_bytes(self) -> int:
        """All handles: on CUDA memory never leaves the pool, it only changes its address."""
        return self._physical

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """See ``Backing``. One extent: each stripe's chunks in the order of the buffers.

        Raises:
            MemoryError: no gap in training's addresses, or the driver refused; nothing was moved.
            BrokenPoolError: what was done before the refusal could not be undone: restart the
                server.
        """
        self._check(stripes)
        self._fence()
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
        self._fence()
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
        if self._broken is not None:
            raise BrokenPoolError(self._broken)
        if not self._kv:
            raise ValueError("the pool's memory was closed")

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

    def _map(self, address: int, handles: Sequence[int], undo: Undo, *, size: int = 0) -> None:
        """Map handles of ``size`` bytes (a chunk) in a row; access is set once for all of them."""
        size = size or self.geometry.chunk_bytes
        for index, handle in enumerate(handles):
            self._driver.map(address + index * size, size, handle)
            undo.append(partial(self._driver.unmap, address + index * size, size))
        if handles:
            self._driver.set_access(address, len(handles) * size)

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
                self._fence()  # of memory that was being cleared
                for step in reversed(undo):
                    step()
            except DriverError as second:
                self._broken = (
                    f"moving the pool's memory failed ({error.message}) and could not be undone "
                    f"({second.message}): restart the server"
                )
                raise BrokenPoolError(self._broken) from error
            raise

    def _event(self, stream: int) -> int:
        if stream not in self._events:
            self._events[stream] = self._driver.event()
            self._teardown.append(partial(self._driver.destroy_event, self._events[stream]))
        return self._events[stream]

    def _fence(self) -> None:
        """Return when all that the streams were given until now is done."""
        streams = list(dict.fromkeys(self._streams()))
        for stream in streams:
            self._driver.record(self._event(stream), stream)
        for stream in streams:
            if not self._driver.done(self._event(stream)):
                self._driver.synchronize(self._event(stream))

    def _fill(self, ranges: Sequence[tuple[int, int]], value: int) -> None:
        """Fill (address, bytes); all that any of the streams is given later comes after it."""
        first, *others = dict.fromkeys(self._streams())
        for address, nbytes in ranges:
            self._driver.fill(address, value, nbytes, first)
        event = self._event(first)
        self._driver.record(event, first)
        for other in others:
            self._driver.wait(other, event)

    def close(self) -> None:
        """See ``Backing``; may be repeated."""
        self._kv = []
        if self._events:
            self._fence()
        for at, stripes in self._lent.items():
            self._driver.unmap(at, self._bytes_of(stripes))
        self._lent = {}
        while self._teardown:
            self._teardown.pop()()
        self._events = {}


def tail_bytes(geometry: PoolGeometry, granularity: int) -> int:
    """Bytes mapped behind the last whole stripe of a buffer: a multiple of the granularity."""
    return -(-(geometry.buffer_bytes - geometry.stripes * geometry.chunk_bytes) // granularity) * granularity


def overhead_bytes(geometry: PoolGeometry, granularity: int) -> int:
    """Device memory beyond the pool's budget: the scratch chunk and the rounding of the tails."""
    mapped = geometry.stripes * geometry.chunk_bytes + tail_bytes(geometry, granularity)
    return geometry.chunk_bytes + geometry.buffers * (mapped - geometry.buffer_bytes)

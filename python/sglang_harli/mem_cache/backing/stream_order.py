"""The order of a pool's moves with what its streams were given, by events of the driver.

    every stream ── record ──► the first waits: work, fill ── record ──► the others wait

Forwards and training run on the first stream. Nothing here makes the host wait but ``fence``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_harli.mem_cache.backing.cuda_driver import Driver

Streams = Callable[[], Sequence[int]]


class StreamOrder:
    """Events between the streams that touch a pool, one for each stream.

    ``streams``: asked at every move: raw handles of all streams that may touch KV rows or leases,
    that of forwards and training first. Every method raises ``DriverError``.
    """

    def __init__(self, driver: Driver, streams: Streams) -> None:
        self._driver, self._streams = driver, streams
        self._events: dict[int, int] = {}  # stream -> its event
        self._filled = False
        self._unsettled = False  # something was filled and spread since ``settle``

    def _all(self) -> list[int]:
        return list(dict.fromkeys(self._streams()))

    def _event(self, stream: int) -> int:
        if stream not in self._events:
            self._events[stream] = self._driver.event()
        return self._events[stream]

    def gather(self) -> None:
        """What the first stream is given from now on runs after all that the others were given."""
        first, *others = self._all()
        for other in others:
            self._driver.record(self._event(other), other)
            self._driver.wait(first, self._event(other))

    def spread(self) -> None:
        """What the others are given from now on runs after all that the first was given."""
        first, *others = self._all()
        event = self._event(first)
        self._driver.record(event, first)
        for other in others:
            self._driver.wait(other, event)
        self._unsettled = self._filled

    def fill(self, ranges: Sequence[tuple[int, int]], value: int) -> None:
        """Fill (address, bytes) on the first stream."""
        first, self._filled = self._all()[0], True
        for address, nbytes in ranges:
            self._driver.fill(address, value, nbytes, first)

    def settle(self) -> None:
        """Return when what was filled before the last ``spread`` is; the host waits if need be."""
        if not self._unsettled:
            return
        self._unsettled = False
        event = self._event(self._all()[0])  # recorded by ``spread``, or later
        if not self._driver.done(event):
            self._driver.synchronize(event)

    def fence(self) -> None:
        """Return when all that the streams were given until now is done: the host waits."""
        streams = self._all()
        for stream in streams:
            self._driver.record(self._event(stream), stream)
        for stream in streams:
            if not self._driver.done(self._event(stream)):
                self._driver.synchronize(self._event(stream))

    def close(self) -> None:
        """Wait for the streams, and let the events go."""
        if self._events or self._filled:
            self.fence()
        self._filled = False
        while self._events:
            self._driver.destroy_event(self._events.popitem()[1])

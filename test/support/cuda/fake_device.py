"""A double of ``torch.get_device_module("cuda")`` on a virtual clock, for what schedules work.

A kernel is a stream and seconds.  Launching one costs the host some; each stream runs its kernels
in order and waits for events; the host waits in ``synchronize`` only.  No wall time passes, so that
a test gives the same each time.  Streams run beside one another at full speed, as on a device that
is large enough for all of them: what contention costs is not modelled.

Rules of the real module that are kept: an event that was never recorded is over, and has no time; a
time is read of two events that are over and were made with ``enable_timing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EVENT_S = 1e-6  # of the host, for each record


@dataclass
class VirtualClock:
    """Seconds that pass when something takes time; called, it tells them."""

    s: float = 1000.0

    def __call__(self) -> float:
        return self.s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, seconds
        self.s += seconds

    def until(self, at_s: float) -> None:
        """Pass the time until then, if it is to come."""
        self.s = max(self.s, at_s)


@dataclass(frozen=True)
class Kernel:
    """One kernel that was launched: when the host did so, and when it runs."""

    name: str
    stream: FakeStream
    launched_s: float
    begin_s: float
    end_s: float


class FakeStream:
    """See ``torch.cuda.Stream``."""

    def __init__(self, device: FakeDevice, number: int) -> None:
        self._device, self.number = device, number
        self.free_s = 0.0  # when all that was given to it is over

    @property
    def cuda_stream(self) -> int:
        """Its handle."""
        return self.number

    def query(self) -> bool:
        return self.free_s <= self._device.clock.s

    def synchronize(self) -> None:
        self._device.host_waits(self.free_s)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = FakeEvent(self._device) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        if event.at_s is not None:
            self.free_s = max(self.free_s, event.at_s)

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())

    def __repr__(self) -> str:
        return f"FakeStream({self.number})"


class FakeEvent:
    """See ``torch.cuda.Event``.  ``at_s``: when it is over; None: it was never recorded."""

    def __init__(self, device: FakeDevice, *, enable_timing: bool = False) -> None:
        self._device, self._timed = device, enable_timing
        self.at_s: float | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        device = self._device
        device.clock.advance(device.event_s)
        stream = device.current_stream() if stream is None else stream
        self.at_s = stream.free_s = max(stream.free_s, device.clock.s)

    def wait(self, stream: FakeStream | None = None) -> None:
        (self._device.current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        return self.at_s is None or self.at_s <= self._device.clock.s

    def synchronize(self) -> None:
        if self.at_s is not None:
            self._device.host_waits(self.at_s)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds to ``end``; RuntimeError where the real one raises it."""
        for event in (self, end):
            if event.at_s is None or not event._timed:
                raise RuntimeError("both events need enable_timing=True and a record")
            if not event.query():
                raise RuntimeError("both events have to be over")
        assert self.at_s is not None and end.at_s is not None
        return (end.at_s - self.at_s) * 1e3


class FakeDevice:
    """The module.

    Args:
        clock: the virtual time; launch_s: of the host for each kernel; event_s: for each record.

    Attributes:
        kernels: all that were launched, in order; waited_s: of the host for the device.
    """

    def __init__(
        self, clock: VirtualClock | None = None, *, launch_s: float = 8e-6, event_s: float = EVENT_S
    ) -> None:
        self.clock = VirtualClock() if clock is None else clock
        self.launch_s, self.event_s = launch_s, event_s
        self.kernels: list[Kernel] = []
        self.waited_s = 0.0
        self._streams: list[FakeStream] = []
        self._current = [self.Stream()]

    # ---------------------------------------------------------------- as torch.cuda has it
    def Stream(self, device: object = None, priority: int = 0) -> FakeStream:
        self._streams.append(FakeStream(self, len(self._streams)))
        return self._streams[-1]

    def Event(self, enable_timing: bool = False, **_options: bool) -> FakeEvent:
        return FakeEvent(self, enable_timing=enable_timing)

    @contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        self._current.append(self._current[-1] if stream is None else stream)
        try:
            yield
        finally:
            self._current.pop()

    StreamContext = stream

    def current_stream(self, device: object = None) -> FakeStream:
        return self._current[-1]

    def default_stream(self, device: object = None) -> FakeStream:
        return self._streams[0]

    def synchronize(self, device: object = None) -> None:
        self.host_waits(max(stream.free_s for stream in self._streams))

    # ---------------------------------------------------------------- what a test does with it
    def launch(
        self, seconds: float, name: str = "", *, stream: FakeStream | None = None, host_s: float | None = None
    ) -> Kernel:
        """A kernel on ``stream`` (default: the current one); ``host_s``: of its launch."""
        stream = self.current_stream() if stream is None else stream
        begun_s = self.clock.s
        self.clock.advance(self.launch_s if host_s is None else host_s)
        begin_s = max(stream.free_s, self.clock.s)
        stream.free_s = begin_s + seconds
        kernel = Kernel(name, stream, begun_s, begin_s, stream.free_s)
        self.kernels.append(kernel)
        return kernel

    def host_waits(self, at_s: float) -> None:
        """The host waits until then."""
        before_s = self.clock.s
        self.clock.until(at_s)
        self.waited_s += self.clock.s - before_s

    def named(self, prefix: str) -> list[Kernel]:
        """The kernels whose names begin so."""
        return [kernel for kernel in self.kernels if kernel.name.startswith(prefix)]

"""Finds work on tensors that no event orders: read or written on one stream after another's work.

Streams and events are those of the fake device, with a vector clock each: a stream knows how far
every other had come at the last wait. A dispatch mode notes each operation's current stream, and
what it reads and writes, from the first byte of a view to its last.

    with HappensBefore(device := OrderedDevice()):
        ...   # torch operations, in whatever ``device.stream(...)``
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.cuda.fake_device import FakeDevice, FakeEvent, FakeStream

Clock = dict[int, int]  # stream -> its operations that are known to be over


class UnorderedError(AssertionError):
    """On a device the two could run in either order, or at once."""


class OrderedStream(FakeStream):
    """A stream that remembers what it waited for."""

    def __init__(self, device: OrderedDevice, number: int) -> None:
        super().__init__(device, number)
        self.clock: Clock = {}

    def knows(self, clock: Clock) -> None:
        """What is launched here from now on comes behind that."""
        for stream, count in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = self._device.Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        super().wait_event(event)
        assert isinstance(event, OrderedEvent)
        self.knows(event.clock)


class OrderedEvent(FakeEvent):
    """An event that remembers what came before its record."""

    clock: Clock

    def __init__(self, device: FakeDevice, *, enable_timing: bool = False) -> None:
        super().__init__(device, enable_timing=enable_timing)
        self.clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        super().record(stream)
        stream = self._device.current_stream() if stream is None else stream
        assert isinstance(stream, OrderedStream)
        self.clock = dict(stream.clock)

    def query(self) -> bool:
        over = super().query()
        if over:
            self._seen_by_host()
        return over

    def synchronize(self) -> None:
        super().synchronize()
        self._seen_by_host()

    def _seen_by_host(self) -> None:
        """Whatever the host launches from now on, on any stream, comes behind it."""
        for stream in self._device._streams:
            assert isinstance(stream, OrderedStream)
            stream.knows(self.clock)


class OrderedDevice(FakeDevice):
    """The fake device, whose streams and events remember the order of work."""

    def Stream(self, device: object = None, priority: int = 0) -> FakeStream:
        self._streams.append(OrderedStream(self, len(self._streams)))
        return self._streams[-1]

    def Event(self, enable_timing: bool = False, **_options: bool) -> FakeEvent:
        return OrderedEvent(self, enable_timing=enable_timing)


@dataclass(frozen=True)
class _Access:
    """``count``: the operation's number on that stream; ``begin``, ``end``: bytes of storage."""

    stream: int
    count: int
    name: str
    begin: int = 0
    end: int = 0
    writes: bool = False

    def meets(self, other: _Access) -> bool:
        return self.begin < other.end and other.begin < self.end

    def covers(self, other: _Access) -> bool:
        return self.begin <= other.begin and other.end <= self.end


@dataclass
class _Memory:
    """What was done to one storage, and is not overwritten."""

    reference: StorageWeakRef
    accesses: list[_Access] = field(default_factory=list)


class HappensBefore(TorchDispatchMode):
    """See the module. ``operations``: how many were looked at."""

    def __init__(self, device: OrderedDevice) -> None:
        super().__init__()
        self._device = device
        self._memories: dict[int, _Memory] = {}
        self._staging: set[int] = set()
        self.operations = 0

    def staging(self, tensor: Tensor) -> Tensor:
        """Host memory that the host fills and empties itself, behind events: not looked at."""
        self._staging.add(_key(tensor))
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags or func.is_view:
            return out
        written = [t for t in _written(func, args, kwargs) if self._looked_at(t)]
        inputs = [t for t in tree_leaves((args, kwargs)) if self._looked_at(t)]
        outputs = [] if _only_allocates(func) else [t for t in tree_leaves(out) if self._looked_at(t)]
        stream = self._device.current_stream()
        assert isinstance(stream, OrderedStream)
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        now = _Access(stream.number, stream.clock[stream.number], str(func))
        self.operations += 1
        for tensor in inputs:
            if not any(tensor is target for target in written):
                self._read(tensor, now, stream.clock)
        for tensor in (*written, *(t for t in outputs if not any(t is target for target in written))):
            self._write(tensor, now, stream.clock)
        return out

    def _looked_at(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _key(value) not in self._staging

    def _memory(self, tensor: Tensor) -> _Memory:
        found = self._memories.get(_key(tensor))
        if found is None or found.reference.expired():
            found = self._memories[_key(tensor)] = _Memory(StorageWeakRef(tensor.untyped_storage()))
        return found

    def _read(self, tensor: Tensor, now: _Access, clock: Clock) -> None:
        memory, now = self._memory(tensor), _of(tensor, now, writes=False)
        for before in memory.accesses:
            if before.writes and before.meets(now):
                _check(before, now, clock, "reads")
        memory.accesses = [
            before
            for before in memory.accesses
            if before.writes or before.stream != now.stream or not now.covers(before)
        ]
        memory.accesses.append(now)

    def _write(self, tensor: Tensor, now: _Access, clock: Clock) -> None:
        memory, now = self._memory(tensor), _of(tensor, now, writes=True)
        for before in memory.accesses:
            if before.meets(now):
                _check(before, now, clock, "writes")
        memory.accesses = [before for before in memory.accesses if not now.covers(before)]
        memory.accesses.append(now)


def _only_allocates(func: Any) -> bool:
    """Whether what it returns holds nothing yet: no order is needed before it is written."""
    return "empty" in str(func)


def _of(tensor: Tensor, access: _Access, *, writes: bool) -> _Access:
    """The same of a tensor's bytes."""
    size, begin = tensor.element_size(), tensor.storage_offset()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin + last + 1 if tensor.numel() else begin
    return replace(access, begin=begin * size, end=end * size, writes=writes)


def _check(before: _Access, now: _Access, clock: Clock, what: str) -> None:
    if before.stream == now.stream or clock.get(before.stream, 0) >= before.count:
        return
    raise UnorderedError(
        f"{now.name} on stream {now.stream} {what} what {before.name} on stream {before.stream} used, and does not "
        "wait for it"
    )


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation changes."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found

"""Finds work on tensors that no event orders: read or written on one stream after another's work.

Streams and events are those of the fake device, with a vector clock each: a stream knows how far
every other had come at the last wait. A dispatch mode notes each operation's current stream, and
what it reads and writes; storages are told apart, not views.

    with HappensBefore(device := OrderedDevice()):
        ...   # torch operations, in whatever ``device.stream(...)``
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = self._device.Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        super().wait_event(event)
        assert isinstance(event, OrderedEvent)
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)


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


class OrderedDevice(FakeDevice):
    """The fake device, whose streams and events remember the order of work."""

    def Stream(self, device: object = None, priority: int = 0) -> FakeStream:
        self._streams.append(OrderedStream(self, len(self._streams)))
        return self._streams[-1]

    def Event(self, enable_timing: bool = False, **_options: bool) -> FakeEvent:
        return OrderedEvent(self, enable_timing=enable_timing)


@dataclass
class _Access:
    stream: int
    count: int  # the operation's number on that stream
    name: str


@dataclass
class _Memory:
    """What was done to one storage."""

    reference: StorageWeakRef
    write: _Access | None = None
    reads: dict[int, _Access] = field(default_factory=dict)  # by stream, since the write


class HappensBefore(TorchDispatchMode):
    """See the module. ``operations``: how many were looked at."""

    def __init__(self, device: OrderedDevice) -> None:
        super().__init__()
        self._device = device
        self._memories: dict[int, _Memory] = {}
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags or func.is_view:
            return out
        written = _written(func, args, kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        stream = self._device.current_stream()
        assert isinstance(stream, OrderedStream)
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        now = _Access(stream.number, stream.clock[stream.number], str(func))
        self.operations += 1
        targets = {_key(t) for t in (*written, *outputs)}
        for tensor in inputs:
            if _key(tensor) not in targets:
                self._read(tensor, now, stream.clock)
        for tensor in {_key(t): t for t in (*written, *outputs)}.values():
            self._write(tensor, now, stream.clock)
        return out

    def _memory(self, tensor: Tensor) -> _Memory:
        found = self._memories.get(_key(tensor))
        if found is None or found.reference.expired():
            found = self._memories[_key(tensor)] = _Memory(StorageWeakRef(tensor.untyped_storage()))
        return found

    def _read(self, tensor: Tensor, now: _Access, clock: Clock) -> None:
        memory = self._memory(tensor)
        _check(memory.write, now, clock, "reads")
        memory.reads[now.stream] = now

    def _write(self, tensor: Tensor, now: _Access, clock: Clock) -> None:
        memory = self._memory(tensor)
        for before in (memory.write, *memory.reads.values()):
            _check(before, now, clock, "writes")
        memory.write, memory.reads = now, {}


def _check(before: _Access | None, now: _Access, clock: Clock, what: str) -> None:
    if before is None or before.stream == now.stream or clock.get(before.stream, 0) >= before.count:
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

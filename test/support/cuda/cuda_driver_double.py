"""A double of the CUDA driver that enforces its rules, with real memory behind it.

Handles are ranges of one memory file and mappings are real mappings of it, so that a handle that is
mapped twice shows the same bytes at both addresses and torch can use them.  Streams are queues:
nothing that was given to a stream happens before the test lets it (``advance``) or the host waits
for it.  A broken rule is a ``RuleBroken``.

Where the real driver is more lenient, the double is strict: handles are released when they are
mapped nowhere.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.cuda_driver import DriverError

FRESH = 0xA5  # what new physical memory holds: anything but zeros
FIXED = 0x10  # MAP_FIXED, which the mmap module does not name
NOTHING = 0  # PROT_NONE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class RuleBroken(AssertionError):
    """The real driver would have refused this, or crashed the process."""


@dataclass(eq=False)
class _Marker:
    """What an event stands for since it was recorded."""

    stream: int
    done: bool = False


@dataclass
class _Work:
    """A kernel: the ranges that it touches, and what it does to them."""

    ranges: Sequence[tuple[int, int]]
    action: Callable[[], None] = lambda: None


@dataclass
class _Wait:
    marker: _Marker


@dataclass
class _Mapping:
    nbytes: int
    handle: int
    access: bool = False


@dataclass
class DriverDouble:
    """See ``Driver``.

    Attributes:
        granularity: bytes; a multiple of the host's page.
        refuse: call -> how many more of it succeed before one is refused (once).
        calls: how often each call was made.
    """

    granularity: int = 2 * mmap.PAGESIZE
    refuse: dict[str, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._file = os.memfd_create("physical")
        self._size = 0
        self._handles: dict[int, tuple[int, int]] = {}  # handle -> offset in the file, bytes
        self._reserved: dict[int, tuple[int, int, int]] = {}  # address -> bytes, and what the host reserved
        self._mapped: dict[int, _Mapping] = {}
        self._events: dict[int, _Marker | None] = {}
        self._streams: dict[int, deque[_Work | _Wait | _Marker]] = {}
        self._next = 1

    # what a test does with it

    def launch(
        self, stream: int, ranges: Sequence[tuple[int, int]], action: Callable[[], None] = lambda: None
    ) -> None:
        """Give the stream a kernel that touches these (address, bytes)."""
        self._queue(stream).append(_Work(ranges, action))

    def write_later(self, stream: int, tensor: Tensor, value: int) -> None:
        """Give the stream a kernel that fills the tensor."""
        self.launch(stream, [(tensor.data_ptr(), tensor.nbytes)], lambda: _set(tensor, value))

    def advance(self, stream: int) -> None:
        """Do all that the stream was given."""
        queue = self._queue(stream)
        while queue:
            self._do_first(queue)

    def assert_clean(self) -> None:
        """Nothing is left: no range, handle, mapping or event."""
        left = {
            "ranges": self._reserved,
            "handles": self._handles,
            "mappings": self._mapped,
            "events": self._events,
        }
        leaks = {name: len(things) for name, things in left.items() if things}
        _rule(not leaks, f"left behind: {leaks}")

    def close(self) -> None:
        """Return the host's memory, however much the test left behind."""
        for _, start, length in self._reserved.values():
            _libc.munmap(start, length)
        os.close(self._file)

    # the driver's calls

    def reserve(self, nbytes: int) -> int:
        self._called("reserve")
        self._aligned(nbytes)
        length = nbytes + self.granularity
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, length, NOTHING, flags, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        address = -(-start // self.granularity) * self.granularity
        self._reserved[address] = (nbytes, start, length)
        return address

    def free_address(self, address: int, nbytes: int) -> None:
        self._called("free_address")
        _rule(self._reserved.get(address, (0,))[0] == nbytes, "freed what was not reserved as one")
        _rule(not self._inside(address, nbytes), "freed addresses where something is mapped")
        _, start, length = self._reserved.pop(address)
        _libc.munmap(start, length)

    def create(self, nbytes: int) -> int:
        self._called("create")
        self._aligned(nbytes)
        offset, self._size = self._size, self._size + nbytes
        os.ftruncate(self._file, self._size)
        os.pwrite(self._file, bytes([FRESH]) * nbytes, offset)
        handle = self._number()
        self._handles[handle] = (offset, nbytes)
        return handle

    def release(self, handle: int) -> None:
        self._called("release")
        _rule(handle in self._handles, "released what is no handle, or twice")
        _rule(all(m.handle != handle for m in self._mapped.values()), "released while mapped")
        del self._handles[handle]

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._called("map")
        self._aligned(address, nbytes)
        _rule(handle in self._handles, "mapped what is no handle")
        offset, whole = self._handles[handle]
        _rule(nbytes == whole, "mapped a part of a handle")
        inside = any(at <= address and address + nbytes <= at + n for at, (n, *_) in self._reserved.items())
        _rule(inside, "mapped where nothing is reserved")
        _rule(not self._inside(address, nbytes), "mapped where something is mapped")
        self._host_map(address, nbytes, mmap.MAP_SHARED | FIXED, self._file, offset)
        self._mapped[address] = _Mapping(nbytes, handle)

    def unmap(self, address: int, nbytes: int) -> None:
        self._called("unmap")
        found = self._covering(address, nbytes)
        for queue in self._streams.values():
            for work in queue:
                ranges = work.ranges if isinstance(work, _Work) else ()
                used = any(at < address + nbytes and address < at + n for at, n in ranges)
                _rule(not used, "unmapped while a stream still uses it")
        for at in found:
            del self._mapped[at]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED
        self._host_map(address, nbytes, flags, -1, 0)

    def set_access(self, address: int, nbytes: int) -> None:
        self._called("set_access")
        for at in self._covering(address, nbytes):
            self._mapped[at].access = True
        assert _libc.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE) == 0

    def event(self) -> int:
        self._called("event")
        event = self._number()
        self._events[event] = None
        return event

    def destroy_event(self, event: int) -> None:
        self._called("destroy_event")
        _rule(event in self._events, "destroyed what is no event, or twice")
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._called("record")
        _rule(event in self._events, "recorded what is no event")
        queue = self._queue(stream)
        marker = _Marker(stream, done=not queue)
        self._events[event] = marker
        if queue:
            queue.append(marker)

    def done(self, event: int) -> bool:
        self._called("done")
        marker = self._events[event]
        return marker is None or marker.done

    def synchronize(self, event: int) -> None:
        self._called("synchronize")
        marker = self._events[event]
        if marker is not None:
            self._reach(marker)

    def wait(self, stream: int, event: int) -> None:
        self._called("wait")
        marker = self._events[event]
        if marker is not None and not marker.done:
            self._queue(stream).append(_Wait(marker))

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._called("fill")
        self.launch(stream, [(address, nbytes)], lambda: _fill(address, value, nbytes))

    def tensor(self, address: int, nbytes: int) -> Tensor:
        self._called("tensor")
        self._touch(address, nbytes)
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    # how

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.refuse:
            self.refuse[name] -= 1
            if self.refuse[name] < 0:
                del self.refuse[name]
                raise DriverError.of(name, "CUDA_ERROR_OUT_OF_MEMORY")

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _queue(self, stream: int) -> deque[_Work | _Wait | _Marker]:
        return self._streams.setdefault(stream, deque())

    def _do_first(self, queue: deque[_Work | _Wait | _Marker]) -> None:
        first = queue[0]
        if isinstance(first, _Wait):
            self._reach(first.marker)
        elif isinstance(first, _Work):
            for address, nbytes in first.ranges:
                self._touch(address, nbytes)
            first.action()
        else:
            first.done = True
        queue.popleft()

    def _reach(self, marker: _Marker) -> None:
        while not marker.done:
            self._do_first(self._queue(marker.stream))

    def _aligned(self, *values: int) -> None:
        wrong = [v for v in values if v <= 0 or v % self.granularity]
        _rule(not wrong, f"not a multiple of the granularity {self.granularity}: {wrong}")

    def _inside(self, address: int, nbytes: int) -> list[int]:
        """Mappings that overlap the range, lowest first."""
        return sorted(
            at for at, m in self._mapped.items() if at < address + nbytes and address < at + m.nbytes
        )

    def _covering(self, address: int, nbytes: int) -> list[int]:
        """The mappings that make up exactly this range."""
        found, at = self._inside(address, nbytes), address
        for start in found:
            _rule(start == at, "a hole, or the middle of a mapping")
            at += self._mapped[start].nbytes
        _rule(at == address + nbytes, "a hole, or the middle of a mapping")
        return found

    def _touch(self, address: int, nbytes: int) -> None:
        at = address
        for start in self._inside(address, nbytes):
            _rule(start <= at, "touched where nothing is mapped")
            _rule(self._mapped[start].access, "touched before access was set")
            at = start + self._mapped[start].nbytes
        _rule(at >= address + nbytes, "touched where nothing is mapped")

    def _host_map(self, address: int, nbytes: int, flags: int, file: int, offset: int) -> None:
        got = _libc.mmap(address, nbytes, NOTHING, flags, file, offset)
        assert got == address, os.strerror(ctypes.get_errno())


def _rule(kept: bool, broken: str) -> None:
    if not kept:
        raise RuleBroken(broken)


def _set(tensor: Tensor, value: int) -> None:
    tensor.fill_(value)


def _fill(address: int, value: int, nbytes: int) -> None:
    ctypes.memset(address, value, nbytes)

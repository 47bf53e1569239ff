"""What moving memory costs in calls of the CUDA driver, with microseconds that others published.

Not measured here: create, map, set access and unmap are those that kvcached (ovg-project/kvcached)
published for 2 MiB pages on an A100. Tests assert *calls*; the
microseconds are for comparing two ways of moving the same memory. Events and fills are priced at a
few microseconds each, as a launch is. What the host waits for in ``synchronize`` (the rest of a
batch or quantum) is counted, not priced.

``PYTHONPATH=python:test python -m support.cuda.driver_costs`` prints 1 GiB, one way and back.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.geometry import PoolGeometry

MICROSECONDS = {
    "create": 193.0,
    "map": 1.5,
    "set_access": 36.0,  # a call; per handle, says torch's own comment on expandable segments
    "unmap": 26.0,
    "fill": 4.0,
    "record": 2.0,
    "wait": 2.0,
    "done": 1.0,
    "synchronize": 0.0,
}
GIB = 2**30


class CountingDriver:
    """A driver that counts and remembers nothing else; memory is an address. See ``Driver``."""

    granularity = 2 * 2**20

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        self._addresses = itertools.count(1 << 46, 1 << 42)  # apart by more than a pool

    def _count(self, name: str) -> int:
        self.calls[name] += 1
        return next(self._numbers)

    def reserve(self, nbytes: int) -> int:
        self._count("reserve")
        return next(self._addresses)

    def free_address(self, address: int, nbytes: int) -> None:
        self._count("free_address")

    def create(self, nbytes: int) -> int:
        return self._count("create")

    def release(self, handle: int) -> None:
        self._count("release")

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._count("map")

    def unmap(self, address: int, nbytes: int) -> None:
        self._count("unmap")

    def set_access(self, address: int, nbytes: int) -> None:
        self._count("set_access")

    def event(self) -> int:
        return self._count("event")

    def destroy_event(self, event: int) -> None:
        self._count("destroy_event")

    def record(self, event: int, stream: int) -> None:
        self._count("record")

    def done(self, event: int) -> bool:
        self._count("done")
        return False  # a batch is in flight

    def synchronize(self, event: int) -> None:
        self._count("synchronize")

    def wait(self, stream: int, event: int) -> None:
        self._count("wait")

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._count("fill")

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """Of no memory at all: only its address and length mean something."""
        return _Nowhere(address, nbytes)  # type: ignore[return-value]


class _Nowhere:
    """The part of a tensor that backings use."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._address, self.nbytes = address, nbytes

    def data_ptr(self) -> int:
        return self._address

    def numel(self) -> int:
        return self.nbytes

    def narrow(self, _dim: int, start: int, length: int) -> _Nowhere:
        return _Nowhere(self._address + start, length)


def h200(layers: int = 32) -> PoolGeometry:
    """The pool of an 8B model on an H200: 123 GiB, 8 KV heads of 128 in bf16."""
    row_bytes = 2048
    return PoolGeometry.plan(
        slots=123 * GIB // (2 * layers * row_bytes),
        row_bytes=row_bytes,
        buffers=2 * layers,
        page_size=1,
        granularity=CountingDriver.granularity,
    )


def microseconds(calls: Counter[str]) -> float:
    """By the published figures."""
    return sum(MICROSECONDS.get(name, 0.0) * count for name, count in calls.items())


@functools.cache
def moved(
    kind: Callable[..., AliasedBacking | CudaBacking], nbytes: int = GIB
) -> tuple[Counter[str], Counter[str], float]:
    """Calls of lending ``nbytes`` and of giving them back, and seconds of creating the pool."""
    geometry, driver = h200(), CountingDriver()
    backing = kind(geometry, torch.device("cpu"), driver, lambda: [11, 12, 13])
    start_s = microseconds(driver.calls) / 1e6
    stripes = list(geometry.lendable)[-geometry.stripes_for(nbytes) :]
    backing.lend([1])  # events are made at the first move
    driver.calls.clear()
    extents = backing.lend(stripes)
    lent = driver.calls.copy()
    driver.calls.clear()
    backing.take_back(stripes, extents)
    return lent, driver.calls.copy(), start_s


def report() -> str:
    """Both ways of moving 1 GiB, as lines."""
    lines = [f"1 GiB on an H200 (8B, {h200().stripes} stripes of {h200().stripe_bytes >> 20} MiB), modelled:"]
    for kind in (CudaBacking, AliasedBacking):
        lent, back, start_s = moved(kind)
        for way, calls in (("lend", lent), ("give back", back)):
            shown = ", ".join(f"{count} {name}" for name, count in sorted(calls.items()) if name != "tensor")
            waits = " and a host wait" if calls["synchronize"] else ""
            lines.append(f"  {kind.name:9} {way:9} {microseconds(calls):8.0f} us{waits}: {shown}")
        lines.append(f"  {kind.name:9} at start  {start_s:8.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

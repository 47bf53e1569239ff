"""Memory that came back is cleared before a transfer, which is on no stream, may write to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.host import POISON, HostBacking
from sglang_harli.mem_cache.backing.static import StaticBacking
from support.cuda.cuda_driver_double import DriverDouble
from support.cuda.cuda_pool import FORWARD, SCHEDULE, is_all, plan, rows
from support.pool_parts import small_geometry

KINDS = [AliasedBacking, CudaBacking]


@pytest.fixture
def driver() -> Iterator[DriverDouble]:
    driver = DriverDouble()
    yield driver
    driver.close()


def make(kind: Any, driver: DriverDouble, *, debug: bool = False) -> Any:
    streams = [FORWARD, SCHEDULE]
    return kind(plan(driver), torch.device("cpu"), driver, lambda: streams, debug=debug)


def give_back_under_work(backing: Any, driver: DriverDouble) -> None:
    """Stripe 3 was lent, and comes back while a batch is in flight."""
    extents = backing.lend([3])
    driver.write_later(FORWARD, rows(backing, 0, 1), 55)
    backing.take_back([3], extents)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transfer_that_did_not_wait_would_be_cleared_away(driver: DriverDouble, kind: Any):
    """What ``settle`` is for."""
    backing = make(kind, driver)
    give_back_under_work(backing, driver)
    rows(backing, 0, 3).fill_(9)
    driver.advance(FORWARD)
    assert is_all(rows(backing, 0, 3), 0)
    backing.close()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_transfer_writes_behind_it_stays(driver: DriverDouble, kind: Any, debug: bool):
    backing = make(kind, driver, debug=debug)
    give_back_under_work(backing, driver)
    backing.settle()
    assert is_all(rows(backing, 0, 3), 0)
    rows(backing, 0, 3).fill_(9)
    driver.advance(FORWARD)
    driver.advance(SCHEDULE)
    assert is_all(rows(backing, 0, 3), 9)
    backing.close()


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_came_back_the_driver_is_not_asked(driver: DriverDouble, kind: Any):
    backing = make(kind, driver)
    give_back_under_work(backing, driver)
    backing.settle()
    driver.write_later(FORWARD, rows(backing, 0, 1), 56)  # the next batch
    before = driver.calls.copy()
    backing.settle()
    assert driver.calls == before
    driver.advance(FORWARD)
    backing.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_was_launched_since_is_not_waited_for(driver: DriverDouble, kind: Any):
    backing = make(kind, driver)
    give_back_under_work(backing, driver)
    driver.write_later(FORWARD, rows(backing, 0, 2), 57)
    backing.settle()
    assert is_all(rows(backing, 0, 3), 0) and not is_all(rows(backing, 0, 2), 57)
    driver.advance(FORWARD)
    backing.close()


class Event:
    """An event that is over when it was waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.over = log, False

    def record(self) -> None:
        self.over = False
        self.log.append("record")

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True
        self.log.append("synchronize")


class Module:
    """Torch's module of a device."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Event(self) -> Event:
        self.log.append("event")
        return Event(self.log)


def test_memory_that_is_lent_in_place_waits_once_for_its_clearing():
    module = Module()
    backing = StaticBacking(small_geometry(), "cpu", module=module)
    backing.device = torch.device("cuda")  # events are a device's
    for turn in range(2):
        backing.take_back([2], backing.lend([2]))
        backing.settle()
        backing.settle()
        assert module.log == ["event", *["record", "synchronize"] * (turn + 1)]


@pytest.mark.parametrize(
    "kind", [HostBacking, lambda geometry, debug: StaticBacking(geometry, "cpu", debug=debug)]
)
def test_on_a_host_it_is_over_at_once(kind: Any):
    """Poison included: rows are zeros when they can be given to a transfer."""
    backing = kind(small_geometry(), debug=True)
    extents = backing.lend([2, 3])
    assert all(is_all(extent, POISON) for extent in extents)
    backing.take_back([2, 3], extents)
    backing.settle()
    size = backing.geometry.chunk_bytes
    for buffer in range(backing.geometry.buffers):
        assert is_all(backing.kv_bytes(buffer)[2 * size : 4 * size], 0)

"""The driver's double breaks a test that breaks a rule of the driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from support.cuda.cuda_driver_double import FRESH, DriverDouble, RuleBroken

GRAIN = DriverDouble().granularity
STREAM, OTHER = 7, 8


@pytest.fixture
def driver() -> Iterator[DriverDouble]:
    driver = DriverDouble()
    yield driver
    driver.close()


def mapped(driver: DriverDouble, *, grains: int = 1) -> tuple[int, int]:
    """(address, handle) of one usable mapping."""
    address, handle = driver.reserve(grains * GRAIN), driver.create(grains * GRAIN)
    driver.map(address, grains * GRAIN, handle)
    driver.set_access(address, grains * GRAIN)
    return address, handle


def broken(match: str):
    return pytest.raises(RuleBroken, match=match)


@pytest.mark.parametrize("nbytes", [0, GRAIN - 1, GRAIN + 4096])
def test_sizes_are_multiples_of_the_granularity(driver: DriverDouble, nbytes: int):
    for call in (driver.reserve, driver.create):
        with broken("granularity"):
            call(nbytes)


def test_addresses_are_multiples_of_the_granularity(driver: DriverDouble):
    address, handle = driver.reserve(2 * GRAIN), driver.create(GRAIN)
    with broken("granularity"):
        driver.map(address + 4096, GRAIN, handle)


def test_nothing_is_mapped_where_nothing_is_reserved(driver: DriverDouble):
    address, handle = driver.reserve(GRAIN), driver.create(2 * GRAIN)
    with broken("nothing is reserved"):
        driver.map(address, 2 * GRAIN, handle)


def test_nothing_is_mapped_twice(driver: DriverDouble):
    address, _ = mapped(driver)
    with broken("something is mapped"):
        driver.map(address, GRAIN, driver.create(GRAIN))


def test_handles_are_mapped_whole(driver: DriverDouble):
    address, handle = driver.reserve(GRAIN), driver.create(2 * GRAIN)
    with broken("part of a handle"):
        driver.map(address, GRAIN, handle)


def test_only_handles_are_mapped(driver: DriverDouble):
    with broken("no handle"):
        driver.map(driver.reserve(GRAIN), GRAIN, 12345)


def test_a_handle_shows_the_same_bytes_wherever_it_is_mapped(driver: DriverDouble):
    first, handle = mapped(driver)
    second = driver.reserve(GRAIN)
    driver.map(second, GRAIN, handle)
    driver.set_access(second, GRAIN)
    here, there = driver.tensor(first, GRAIN), driver.tensor(second, GRAIN)
    assert there[0] == FRESH
    here[0] = 1
    assert there[0] == 1


def test_a_touch_before_access_was_set_is_an_error(driver: DriverDouble):
    address, handle = driver.reserve(GRAIN), driver.create(GRAIN)
    driver.map(address, GRAIN, handle)
    with broken("before access"):
        driver.tensor(address, GRAIN)
    driver.fill(address, 0, GRAIN, STREAM)
    with broken("before access"):
        driver.advance(STREAM)


def test_access_is_forgotten_with_the_mapping(driver: DriverDouble):
    address, handle = mapped(driver)
    driver.unmap(address, GRAIN)
    driver.map(address, GRAIN, handle)
    with broken("before access"):
        driver.tensor(address, GRAIN)


def test_access_is_set_for_whole_mappings(driver: DriverDouble):
    address, _ = mapped(driver, grains=2)
    with broken("middle of a mapping"):
        driver.set_access(address, GRAIN)


def test_a_touch_where_nothing_is_mapped_is_an_error(driver: DriverDouble):
    address = driver.reserve(2 * GRAIN)
    driver.map(address, GRAIN, driver.create(GRAIN))
    driver.set_access(address, GRAIN)
    with broken("nothing is mapped"):
        driver.tensor(address, 2 * GRAIN)
    driver.launch(STREAM, [(address + GRAIN, 1)])
    with broken("nothing is mapped"):
        driver.advance(STREAM)


@pytest.mark.parametrize("part", [(0, GRAIN), (GRAIN, GRAIN), (0, 3 * GRAIN)], ids=["head", "tail", "hole"])
def test_mappings_are_unmapped_whole(driver: DriverDouble, part: tuple[int, int]):
    address, handle = driver.reserve(4 * GRAIN), driver.create(2 * GRAIN)
    driver.map(address, 2 * GRAIN, handle)
    with broken("hole, or the middle"):
        driver.unmap(address + part[0], part[1])


def test_adjacent_mappings_are_unmapped_by_one_call(driver: DriverDouble):
    address = driver.reserve(2 * GRAIN)
    for at in (address, address + GRAIN):
        driver.map(at, GRAIN, driver.create(GRAIN))
    driver.unmap(address, 2 * GRAIN)


def test_nothing_is_unmapped_while_a_stream_uses_it(driver: DriverDouble):
    address, _ = mapped(driver)
    event = driver.event()
    driver.launch(STREAM, [(address + 5, 1)])
    driver.record(event, STREAM)
    assert not driver.done(event)
    with broken("still uses it"):
        driver.unmap(address, GRAIN)
    driver.synchronize(event)
    assert driver.done(event)
    driver.unmap(address, GRAIN)


def test_a_stream_waits_for_another_streams_event(driver: DriverDouble):
    address, _ = mapped(driver)
    event = driver.event()
    driver.fill(address, 1, GRAIN, STREAM)
    driver.record(event, STREAM)
    driver.wait(OTHER, event)
    driver.fill(address, 2, GRAIN, OTHER)
    driver.advance(OTHER)
    assert driver.tensor(address, GRAIN)[0] == 2
    driver.advance(STREAM)
    assert driver.tensor(address, GRAIN)[0] == 2


def test_an_event_stands_for_what_was_given_before_it_was_recorded(driver: DriverDouble):
    address, _ = mapped(driver)
    event = driver.event()
    assert driver.done(event)
    driver.record(event, STREAM)
    driver.fill(address, 1, GRAIN, STREAM)
    assert driver.done(event)
    assert driver.tensor(address, GRAIN)[0] == FRESH


def test_nothing_is_released_while_mapped(driver: DriverDouble):
    address, handle = mapped(driver)
    with broken("while mapped"):
        driver.release(handle)
    driver.unmap(address, GRAIN)
    driver.release(handle)
    with broken("or twice"):
        driver.release(handle)


def test_addresses_are_freed_whole_and_empty(driver: DriverDouble):
    address, _ = mapped(driver)
    with broken("something is mapped"):
        driver.free_address(address, GRAIN)
    driver.unmap(address, GRAIN)
    with broken("reserved as one"):
        driver.free_address(address, 2 * GRAIN)
    driver.free_address(address, GRAIN)


def test_events_are_destroyed_once(driver: DriverDouble):
    event = driver.event()
    driver.destroy_event(event)
    with broken("no event"):
        driver.destroy_event(event)
    with broken("no event"):
        driver.record(event, STREAM)


def test_what_is_left_behind_is_named(driver: DriverDouble):
    driver.assert_clean()
    mapped(driver)
    driver.event()
    with broken("'ranges': 1, 'handles': 1, 'mappings': 1, 'events': 1"):
        driver.assert_clean()


def test_a_call_is_refused_once_when_it_should(driver: DriverDouble):
    driver.refuse["create"] = 1
    driver.create(GRAIN)
    with pytest.raises(DriverError, match=r"create answered CUDA_ERROR_OUT_OF_MEMORY: lower --mem-fraction"):
        driver.create(GRAIN)
    driver.create(GRAIN)

"""The aliased CUDA backing against the driver's double: lending is accounting, giving back a fill,
and events order both with every stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.mem_cache.backing.aliased import AliasedBacking, UnclearedError
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from sglang_harli.mem_cache.backing.device_memory import rounding_bytes
from support.cuda import driver_costs
from support.cuda.cuda_driver_double import DriverDouble
from support.cuda.cuda_pool import BUFFERS, COPY, FORWARD, SCHEDULE, STRIPES, is_all, plan, rows

STREAMS = [FORWARD, SCHEDULE, COPY, FORWARD]
OTHERS = [SCHEDULE, COPY]


@pytest.fixture
def driver() -> Iterator[DriverDouble]:
    driver = DriverDouble()
    yield driver
    driver.close()


def make(driver: DriverDouble, *, debug: bool = False, tail: int = 3) -> AliasedBacking:
    return AliasedBacking(plan(driver, tail=tail), torch.device("cpu"), driver, lambda: STREAMS, debug=debug)


def advance(driver: DriverDouble) -> None:
    for stream in (FORWARD, *OTHERS):
        driver.advance(stream)


@pytest.mark.parametrize("tail", [0, 3])
def test_the_memory_is_the_budget_and_everything_goes_at_the_end(driver: DriverDouble, tail: int):
    backing = make(driver, tail=tail)
    over = rounding_bytes(backing.geometry, driver.granularity)
    assert backing.resident_bytes() == backing.geometry.total_bytes + over
    assert all(is_all(backing.kv_bytes(buffer), 0) for buffer in range(BUFFERS))
    backing.lend([2, 3])
    backing.close()
    backing.close()
    driver.assert_clean()


def test_stripes_in_a_row_are_one_extent_of_their_chunks(driver: DriverDouble):
    backing = make(driver)
    for buffer in range(BUFFERS):
        for stripe in range(STRIPES):
            rows(backing, buffer, stripe).fill_(10 * (buffer + 1) + stripe)
    (extent,) = backing.lend([3, 2])
    chunks = extent.view(2 * BUFFERS, -1)
    assert [int(chunk[0]) for chunk in chunks] == [12, 22, 32, 42, 13, 23, 33, 43]
    assert all(is_all(chunk, int(chunk[0])) for chunk in chunks)
    apart = backing.lend([5, 1])
    size = backing.geometry.stripe_bytes
    assert [e.nbytes for e in apart] == backing.extent_bytes([5, 1]) == [size, size]
    assert backing.extent_bytes([1, 2, 4, 5]) == [2 * size, 2 * size]
    assert [int(e[0]) for e in apart] == [11, 15]
    extent.fill_(77)
    assert is_all(rows(backing, 1, 3), 77)  # the very same memory
    backing.close()


def test_a_forward_in_flight_writes_before_training_does(driver: DriverDouble):
    """Slots may be freed under a forward, which still writes them; on any stream."""
    backing = make(driver)
    for stream in (FORWARD, *OTHERS):
        driver.write_later(stream, rows(backing, 1, 4), 77)
    (extent,) = backing.lend([4])
    driver.write_later(FORWARD, extent, 5)
    driver.advance(FORWARD)
    advance(driver)
    assert is_all(extent, 5)
    backing.close()


@pytest.mark.parametrize("stream", [FORWARD, *OTHERS])
def test_returned_rows_are_zero_before_any_later_forward(driver: DriverDouble, stream: int):
    backing = make(driver)
    extents = backing.lend([3, 4])
    for other in (FORWARD, *OTHERS):  # work in flight on any stream that may touch the lease
        driver.write_later(other, extents[0], 0xFF)
    backing.take_back([3, 4], extents)
    seen: list[int] = []
    row = rows(backing, 0, 3)
    driver.launch(stream, [(row.data_ptr(), row.nbytes)], lambda: seen.append(int(row.max())))
    driver.advance(stream)
    advance(driver)
    assert seen == [0]
    assert all(is_all(rows(backing, b, s), 0) for b in range(BUFFERS) for s in (3, 4))
    backing.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_debug_keeps_the_mapping_and_gives_nan(driver: DriverDouble, dtype: torch.dtype):
    backing = make(driver, debug=True)
    extents = backing.lend([2])
    driver.advance(FORWARD)
    assert extents[0].view(dtype).isnan().all()
    assert rows(backing, 0, 2).view(dtype).isnan().all()  # what a read that is not masked would find
    assert is_all(rows(backing, 0, 1), 0)
    backing.take_back([2], extents)
    assert all(is_all(rows(backing, b, 2), 0) for b in range(BUFFERS))
    backing.close()


def test_debug_finds_memory_that_does_not_come_back_as_zeros(driver: DriverDouble):
    backing = make(driver, debug=True)
    extents = backing.lend([2])
    fill = driver.fill

    def then_written(*arguments: Any) -> None:
        fill(*arguments)
        driver.write_later(FORWARD, rows(backing, 3, 2), 1)

    driver.fill = then_written  # type: ignore[method-assign]
    with pytest.raises(UnclearedError, match="stripe 2 came back with other bytes than zeros in buffer 3"):
        backing.take_back([2], extents)
    backing.close()


@pytest.mark.parametrize("stripes", [[0], [STRIPES], [2, 2], [], [3]], ids=str)
def test_only_lendable_stripes_are_lent_and_each_once(driver: DriverDouble, stripes: list[int]):
    backing = make(driver)
    extents = backing.lend([3])
    with pytest.raises(ValueError, match=r"from 1 to 5, and none of those that are lent \(\[3\]\)"):
        backing.lend(stripes)
    for given_stripes, given_extents in (([4], extents), ([3], []), ([], []), ([3, 4], extents)):
        with pytest.raises(ValueError, match="were not lent as extents"):
            backing.take_back(given_stripes, given_extents)
    backing.take_back([3], extents)
    with pytest.raises(ValueError, match="were not lent as extents"):
        backing.take_back([3], extents)
    backing.close()


@pytest.mark.parametrize("call", ["event", "record", "wait", "fill"])
@pytest.mark.parametrize("after", range(4))
def test_a_refused_move_moves_nothing(driver: DriverDouble, call: str, after: int):
    backing = make(driver, debug=True)
    driver.refuse[call] = after
    try:
        extents = backing.lend([2, 3])
    except MemoryError as error:
        assert f"{call} answered" in str(error) and not backing.lent
        extents = backing.lend([2, 3])
    try:
        backing.take_back([2, 3], extents)
    except DriverError:
        assert backing.lent == {2, 3}
        backing.take_back([2, 3], extents)
    driver.refuse.clear()
    advance(driver)
    assert not backing.lent and is_all(rows(backing, 0, 2), 0)
    backing.close()
    driver.assert_clean()


@pytest.mark.parametrize("after", range(0, 60, 7))
@pytest.mark.parametrize("call", ["reserve", "create", "map", "set_access", "fill", "tensor"])
def test_a_pool_that_cannot_be_built_leaves_nothing_behind(driver: DriverDouble, call: str, after: int):
    driver.refuse[call] = after
    try:
        make(driver).close()
    except DriverError as error:
        assert f"{call} answered" in error.message
    driver.assert_clean()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_chunk_is_where_the_model_says(data: st.DataObject):
    """Random lends and returns with kernels in flight on every stream."""
    driver = DriverDouble()
    backing = make(driver)
    kv = {(b, s): 0 for b in range(BUFFERS) for s in range(STRIPES)}
    leases: dict[tuple[int, ...], tuple[list[torch.Tensor], int]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        free = sorted({s for _, s in kv} - {0})
        if free and data.draw(st.booleans()):
            stripes = tuple(data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True)))
            zombie = data.draw(st.sampled_from(STREAMS))
            driver.write_later(zombie, rows(backing, 0, stripes[0]), 9)
            extents, value = backing.lend(stripes), data.draw(st.integers(1, 255))
            assert sum(e.nbytes for e in extents) == len(stripes) * backing.geometry.stripe_bytes
            for extent in extents:
                driver.write_later(FORWARD, extent, value)
            leases[stripes] = (extents, value)
            kv = {place: value for place, value in kv.items() if place[1] not in stripes}
        elif leases:
            stripes = data.draw(st.sampled_from(sorted(leases)))
            extents, _ = leases.pop(stripes)
            backing.take_back(stripes, extents)
            value = data.draw(st.integers(0, 255))
            for buffer in range(BUFFERS):
                driver.write_later(
                    data.draw(st.sampled_from(STREAMS)), rows(backing, buffer, stripes[0]), value
                )
            kv |= {(b, s): value if s == stripes[0] else 0 for b in range(BUFFERS) for s in stripes}
        if data.draw(st.booleans()):
            driver.advance(data.draw(st.sampled_from(STREAMS)))
    advance(driver)
    assert all(is_all(rows(backing, *place), value) for place, value in kv.items())
    for stripes, (extents, value) in leases.items():
        assert all(is_all(extent, value) for extent in extents)
        assert all(is_all(rows(backing, b, s), value) for b in range(BUFFERS) for s in stripes)
    backing.close()
    driver.assert_clean()
    driver.close()


def test_moving_a_gib_needs_no_call_that_maps_or_waits():
    """At the size of an H200; the old way needs hundreds."""
    lent, back, _ = driver_costs.moved(AliasedBacking)
    assert lent == {"record": 2, "wait": 2}
    assert back == {"record": 3, "wait": 4, "fill": 1}
    lent, back, _ = driver_costs.moved(CudaBacking)
    for calls in (lent, back):
        assert calls["synchronize"] == 3 and min(calls["map"], calls["unmap"], calls["set_access"]) >= 64
    print(driver_costs.report())


def test_large_pools_take_a_quarter_of_the_handles():
    geometry = driver_costs.h200()
    handles = geometry.stripes * geometry.buffers
    assert geometry.stripes >= 128 and handles <= 123 * 2**30 // (2 << 20) // 4 + geometry.buffers

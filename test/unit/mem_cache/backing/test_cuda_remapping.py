"""The CUDA backing against the driver's double: contents follow the handles, and no rule is broken
on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.cuda import BrokenPoolError, CudaBacking, overhead_bytes
from sglang_harli.mem_cache.backing.cuda_driver import DriverError
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.cuda.cuda_driver_double import DriverDouble, RuleBroken
from support.cuda.cuda_pool import (
    BUFFERS,
    COPY,
    FORWARD,
    ROW_BYTES,
    SCHEDULE,
    STRIPES,
    TAIL_SLOTS,
    is_all,
    make,
    rows,
)
from support.pool_parts import IdleSlots


@pytest.fixture
def driver() -> Iterator[DriverDouble]:
    driver = DriverDouble()
    yield driver
    driver.close()


def mark(backing: CudaBacking) -> None:
    """Give each chunk a value of its own."""
    for buffer in range(BUFFERS):
        for stripe in range(STRIPES):
            rows(backing, buffer, stripe).fill_(10 * (buffer + 1) + stripe)


def assert_marked(backing: CudaBacking, stripes: list[int]) -> None:
    for buffer in range(BUFFERS):
        for stripe in stripes:
            assert is_all(rows(backing, buffer, stripe), 10 * (buffer + 1) + stripe), (buffer, stripe)


def test_buffers_have_their_bytes_and_start_as_zeros(driver: DriverDouble):
    backing = make(driver)
    for buffer in range(BUFFERS):
        assert backing.kv_bytes(buffer).shape == (backing.geometry.buffer_bytes,)
        assert is_all(backing.kv_bytes(buffer), 0)
    backing.close()
    driver.assert_clean()


@pytest.mark.parametrize("tail", [0, 1, TAIL_SLOTS])
def test_the_memory_is_the_budget_and_a_named_overhead(driver: DriverDouble, tail: int):
    backing = make(driver, tail=tail)
    over = overhead_bytes(backing.geometry, driver.granularity)
    assert backing.resident_bytes() == backing.geometry.total_bytes + over
    assert over <= backing.geometry.chunk_bytes + BUFFERS * driver.granularity
    backing.close()
    backing.close()
    driver.assert_clean()


def test_a_pool_without_whole_stripes_serves_and_lends_nothing(driver: DriverDouble):
    geometry = PoolGeometry(3, ROW_BYTES, BUFFERS, page_size=1, stripe_slots=driver.granularity // ROW_BYTES)
    backing = CudaBacking(geometry, torch.device("cpu"), driver, lambda: [FORWARD])
    assert is_all(backing.kv_bytes(1), 0)
    with pytest.raises(ValueError, match="cannot lend"):
        backing.lend([1])
    backing.close()
    driver.assert_clean()


def test_chunks_that_are_no_granules_are_refused(driver: DriverDouble):
    geometry = PoolGeometry(100, ROW_BYTES, BUFFERS, page_size=1, stripe_slots=1)
    with pytest.raises(ValueError, match=f"plan the pool with the granularity {driver.granularity}"):
        CudaBacking(geometry, torch.device("cpu"), driver, lambda: [FORWARD])
    driver.assert_clean()


def test_contents_follow_the_handles_into_one_extent(driver: DriverDouble):
    backing = make(driver)
    mark(backing)
    (extent,) = backing.lend([4, 2])
    chunks = extent.view(2 * BUFFERS, backing.geometry.chunk_bytes)
    assert [int(c[0]) for c in chunks] == [14, 24, 34, 44, 12, 22, 32, 42]
    assert all(is_all(chunk, int(chunk[0])) for chunk in chunks)
    assert_marked(backing, [0, 1, 3, 5])
    backing.close()


def test_lent_rows_share_one_scratch_chunk_of_zeros(driver: DriverDouble):
    backing = make(driver)
    mark(backing)
    (extent,) = backing.lend([2, 3])
    extent.fill_(0xFF)
    lent = [rows(backing, buffer, stripe) for buffer in range(BUFFERS) for stripe in (2, 3)]
    assert all(is_all(row, 0) for row in lent)
    lent[0][7] = 1
    assert all(row[7] == 1 for row in lent)
    backing.close()


def test_addresses_never_change(driver: DriverDouble):
    backing = make(driver)
    before = [backing.kv_bytes(b) for b in range(BUFFERS)]
    addresses = [t.data_ptr() for t in before]
    extents = backing.lend([1, 5])
    assert [backing.kv_bytes(b).data_ptr() for b in range(BUFFERS)] == addresses
    backing.take_back([1, 5], extents)
    driver.advance(FORWARD)
    before[2].fill_(9)
    assert is_all(backing.kv_bytes(2), 9)
    backing.close()


def test_returned_rows_are_zero_before_any_later_forward(driver: DriverDouble):
    backing = make(driver)
    extents = backing.lend([3])
    extents[0].fill_(0xFF)
    backing.take_back([3], extents)
    seen: list[int] = []
    row = rows(backing, 0, 3)
    for stream in (FORWARD, SCHEDULE):
        driver.launch(stream, [(row.data_ptr(), row.nbytes)], lambda: seen.append(int(row.max())))
    driver.advance(SCHEDULE)
    driver.advance(FORWARD)
    assert seen == [0, 0]
    assert all(is_all(rows(backing, b, 3), 0) for b in range(BUFFERS))
    backing.close()


def test_a_forward_in_flight_writes_before_training_has_the_memory(driver: DriverDouble):
    backing = make(driver)
    driver.write_later(FORWARD, rows(backing, 1, 4), 77)
    (extent,) = backing.lend([4])
    assert is_all(extent.view(BUFFERS, -1)[1], 77)
    assert is_all(rows(backing, 1, 4), 0)
    backing.close()


def test_a_quantum_in_flight_ends_before_its_memory_goes(driver: DriverDouble):
    backing = make(driver)
    extents = backing.lend([4])
    driver.write_later(FORWARD, extents[0], 0xFF)
    backing.take_back([4], extents)
    driver.advance(FORWARD)
    assert all(is_all(rows(backing, b, 4), 0) for b in range(BUFFERS))
    backing.close()


def test_a_stream_that_was_not_named_is_found_out(driver: DriverDouble):
    backing = make(driver)
    driver.write_later(COPY, rows(backing, 0, 4), 1)
    with pytest.raises(RuleBroken, match="still uses it"):
        backing.lend([4])


def test_the_host_waits_for_events_only_when_work_is_in_flight(driver: DriverDouble):
    backing = make(driver)
    before = driver.calls["synchronize"]
    extents = backing.lend([4])
    assert driver.calls["synchronize"] == before
    driver.write_later(FORWARD, rows(backing, 0, 1), 1)
    backing.take_back([4], extents)
    assert driver.calls["synchronize"] == before + 1
    backing.close()


def test_adjacent_stripes_are_unmapped_and_opened_by_one_call_a_buffer(driver: DriverDouble):
    backing = make(driver)
    driver.calls.clear()
    extents = backing.lend([5, 4, 3])
    assert driver.calls["unmap"] == BUFFERS
    assert driver.calls["set_access"] == BUFFERS + 1
    assert driver.calls["map"] == 2 * 3 * BUFFERS
    assert driver.calls["create"] == 0
    driver.calls.clear()
    backing.take_back([5, 4, 3], extents)
    assert driver.calls["unmap"] == BUFFERS + 1
    assert driver.calls["set_access"] == BUFFERS
    assert driver.calls["map"] == 3 * BUFFERS
    assert driver.calls["fill"] == BUFFERS
    backing.close()
    driver.assert_clean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_debug_makes_what_is_given_away_nan(driver: DriverDouble, dtype: torch.dtype):
    backing = make(driver, debug=True)
    extents = backing.lend([2])
    driver.advance(FORWARD)
    assert extents[0].view(dtype).isnan().all()
    assert rows(backing, 0, 2).view(dtype).isnan().all()
    assert is_all(rows(backing, 0, 1), 0)
    backing.take_back([2], extents)
    driver.advance(FORWARD)
    assert is_all(rows(backing, 0, 2), 0)
    backing.close()


@pytest.mark.parametrize("stripes", [[0], [STRIPES], [2, 2], [], [3]], ids=str)
def test_only_lendable_stripes_are_lent_and_each_once(driver: DriverDouble, stripes: list[int]):
    backing = make(driver)
    backing.lend([3])
    with pytest.raises(ValueError, match=r"from 1 to 5, and none of those that are lent \(\[3\]\)"):
        backing.lend(stripes)
    backing.close()


def test_only_a_whole_lend_is_taken_back(driver: DriverDouble):
    backing = make(driver)
    extents, others = backing.lend([3, 4]), backing.lend([1])
    for stripes, given in (([3], extents), ([3, 4], others), ([3, 4], [*extents, *others]), ([3, 4], [])):
        with pytest.raises(ValueError, match="were not lent together"):
            backing.take_back(stripes, given)
    backing.take_back([3, 4], extents)
    with pytest.raises(ValueError, match="were not lent together"):
        backing.take_back([3, 4], extents)
    backing.close()


CALLS = ("map", "unmap", "set_access", "tensor", "fill")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", range(0, 13, 3))
def test_a_refused_lend_moves_nothing(driver: DriverDouble, call: str, after: int):
    backing = make(driver, debug=True)
    mark(backing)
    driver.refuse[call] = after
    try:
        extents = backing.lend([2, 4, 5])
    except MemoryError as error:
        assert f"{call} answered CUDA_ERROR_OUT_OF_MEMORY" in str(error)
        assert_marked(backing, list(range(STRIPES)))
        assert backing.lend([2, 4, 5])
    else:
        assert driver.refuse.pop(call) >= 0, "the call comes less often than that"
        assert extents
    backing.close()
    driver.assert_clean()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", range(0, 13, 3))
def test_a_refused_return_leaves_the_memory_lent(driver: DriverDouble, call: str, after: int):
    backing = make(driver)
    extents = backing.lend([2, 4, 5])
    extents[0].fill_(33)
    driver.refuse[call] = after
    try:
        backing.take_back([2, 4, 5], extents)
    except DriverError as error:
        assert not isinstance(error, BrokenPoolError)
        assert call == "fill" or is_all(extents[0], 33)
        assert is_all(rows(backing, 0, 4), 0)
        backing.take_back([2, 4, 5], extents)
    driver.refuse.clear()
    driver.advance(FORWARD)
    assert all(is_all(rows(backing, b, s), 0) for b in range(BUFFERS) for s in (2, 4, 5))
    backing.close()
    driver.assert_clean()


def test_what_cannot_be_undone_ends_the_pool(driver: DriverDouble):
    backing = make(driver)
    driver.refuse |= {"set_access": 3, "unmap": 7}
    with pytest.raises(
        BrokenPoolError, match=r"set_access .* could not be undone \(unmap .*restart the server"
    ):
        backing.lend([2, 4, 5])
    with pytest.raises(BrokenPoolError, match="restart the server"):
        backing.lend([1])
    with pytest.raises(BrokenPoolError, match="restart the server"):
        backing.take_back([1], [])


@pytest.mark.parametrize("call", ["create", "reserve", "map", "set_access", "fill", "tensor"])
@pytest.mark.parametrize("after", [0, 2, 7])
def test_a_pool_that_cannot_be_built_leaves_nothing_behind(driver: DriverDouble, call: str, after: int):
    driver.refuse[call] = after
    try:
        make(driver).close()
    except DriverError as error:
        assert f"{call} answered CUDA_ERROR_OUT_OF_MEMORY" in str(error)
    driver.assert_clean()


def test_the_pool_leases_it_and_serves_on_when_the_driver_refuses(driver: DriverDouble):
    backing = make(driver)
    slots = IdleSlots(backing.geometry)
    pool = UnifiedPool(backing.geometry, backing, slots)
    driver.refuse["map"] = 2
    wanted, arena = [((16, 512), torch.float32)], TrainArena(pool)
    assert arena.obtain(MemoryPurpose.STATE, wanted) is None
    assert slots.free == set(backing.geometry.lendable)
    lease = arena.obtain(MemoryPurpose.STATE, wanted)
    assert lease is not None
    lease.carve(*wanted[0]).fill_(1.0)
    pool.lend_to(lambda _: lease.give_back(), None)
    assert pool.reclaim(1) == backing.geometry.stripe_slots
    driver.advance(FORWARD)
    assert all(is_all(backing.kv_bytes(b), 0) for b in range(BUFFERS))
    pool.check()
    backing.close()
    driver.assert_clean()

"""Spaces of training in the pool: what is carved where, in one extent and in many."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.core import MemoryPurpose
from sglang_harli.errors import ConfigError
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.lease import PoolLease, place
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.train_memory import ALIGNMENT, Lease, aligned
from support import pool_parts
from support.pool_parts import arena_of, small_geometry, small_pool

GEOMETRY = small_geometry()  # 9 lendable stripes of 4 chunks of 4 KiB
CHUNK = GEOMETRY.chunk_bytes
BACKINGS = ["host", "static"]


def make(name: str, geometry: PoolGeometry = GEOMETRY) -> Backing:
    return HostBacking(geometry, debug=True) if name == "host" else StaticBacking(geometry, "cpu", debug=True)


def obtain(pool: UnifiedPool, *sizes: int, purpose: MemoryPurpose = MemoryPurpose.STATE) -> PoolLease | None:
    """Float32 vectors of these many bytes."""
    return pool_parts.obtain(pool, purpose, [((size // 4,), torch.float32) for size in sizes])


def carve(lease: Lease, *sizes: int) -> list[torch.Tensor]:
    return [lease.carve((size // 4,), torch.float32) for size in sizes]


def spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors)


def apart(tensors: list[torch.Tensor]) -> bool:
    found = spans(tensors)
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(found))


@settings(max_examples=80, deadline=None)
@given(
    backing=st.sampled_from(BACKINGS),
    sizes=st.lists(st.integers(0, 3 * CHUNK // 4).map(lambda n: 4 * n), min_size=1, max_size=12),
    busy=st.sets(st.sampled_from(GEOMETRY.lendable), max_size=6),
)
def test_what_is_obtained_can_be_carved_in_order_and_apart(backing, sizes, busy):
    pool, slots, _ = small_pool(backing=make(backing))
    slots.free.difference_update(*(GEOMETRY.slots_of(stripe) for stripe in busy))
    lease = obtain(pool, *sizes)
    if lease is None:
        assert backing == "static" or sum(map(aligned, sizes)) > (9 - len(busy)) * GEOMETRY.stripe_bytes
        assert not slots.lent_stripes and not pool.leases
        return
    assert not busy & set(lease.stripes)
    for _ in range(2):
        tensors = carve(lease, *sizes)
        assert apart(tensors)
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert all((t == number).all() for number, t in enumerate(tensors))
        lease.reset()
    lease.give_back()
    pool.check()
    assert not pool.leases and not slots.lent_stripes


@pytest.mark.parametrize("backing", BACKINGS)
def test_no_more_stripes_than_needed_the_highest_first(backing):
    pool, *_ = small_pool(backing=make(backing))
    lease = obtain(pool, CHUNK, CHUNK, CHUNK, CHUNK)
    assert lease is not None and set(lease.stripes) == {9}
    second = obtain(pool, CHUNK, CHUNK, CHUNK, CHUNK, 256)
    assert second is not None and set(second.stripes) == {7, 8}


def test_a_tensor_larger_than_a_chunk_gets_a_run_of_stripes_in_a_static_pool():
    pool, slots, _ = small_pool(backing=make("static"))
    slots.free.difference_update(GEOMETRY.slots_of(8))  # 9 stands alone
    lease = obtain(pool, 3 * CHUNK)
    assert lease is not None and {5, 6, 7} <= set(lease.stripes)
    scattered, scattered_slots, _ = small_pool(backing=make("static"))
    for stripe in range(1, 10, 2):
        scattered_slots.free.difference_update(GEOMETRY.slots_of(stripe))
    assert obtain(scattered, 2 * CHUNK) is None  # not now
    assert not scattered.leases and not scattered_slots.lent_stripes


def test_could_ever_obtain_asks_for_the_empty_pool():
    for backing in BACKINGS:
        pool, slots, _ = small_pool(backing=make(backing))
        slots.free.clear()
        whole = [((9 * CHUNK,), torch.uint8)] * 4
        assert arena_of(pool).could_ever_obtain(whole)
        assert not arena_of(pool).could_ever_obtain([*whole, ((1,), torch.uint8)])
        assert arena_of(pool).could_ever_obtain([((9 * CHUNK + 1,), torch.uint8)]) == (backing == "host")
        pool.quota.max_train_bytes = 2 * GEOMETRY.stripe_bytes
        assert not arena_of(pool).could_ever_obtain(whole[:3])


@pytest.mark.parametrize("backing", BACKINGS)
def test_other_tensors_may_be_carved_after_a_reset(backing):
    pool, *_ = small_pool(backing=make(backing))
    lease = obtain(pool, CHUNK, 512, CHUNK)
    assert lease is not None
    first = carve(lease, CHUNK, 256)  # leaves the plan at the second
    rest = lease.nbytes - CHUNK - 256
    more = carve(lease, *[256] * (rest // 256))
    assert apart(first + more)
    with pytest.raises(MemoryError, match=r"no room for 256 bytes in lease 'state-1'.* has 0"):
        lease.carve((1,), torch.float32)
    lease.reset()
    assert lease.plan([((CHUNK // 4,), torch.float32)] * 2)
    assert not lease.plan([((lease.nbytes + 1,), torch.uint8)])
    assert apart(carve(lease, CHUNK, CHUNK))


def test_after_it_was_given_back_nothing_can_be_carved():
    pool, slots, _ = small_pool()
    lease = obtain(pool, CHUNK)
    assert lease is not None and not lease.revoked
    lease.give_back()
    lease.give_back()
    assert lease.revoked and not slots.lent_stripes
    with pytest.raises(MemoryError, match="given back"):
        lease.carve((1,), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_memory_is_poisoned_in_debug_mode(dtype):
    for backing in BACKINGS:
        pool, *_ = small_pool(backing=make(backing))
        space = arena_of(pool).obtain(MemoryPurpose.KEPT, [((7, 9), dtype)])
        assert space is not None
        tensor = space.carve((7, 9), dtype)
        assert tensor.shape == (7, 9) and tensor.is_contiguous() and tensor.isnan().all()


def test_nothing_asked_for_is_a_lease_all_the_same():
    for backing in BACKINGS:
        pool, *_ = small_pool(backing=make(backing))
        lease = arena_of(pool).obtain(MemoryPurpose.STATE, [])
        assert lease is not None and lease.nbytes == GEOMETRY.stripe_bytes


@given(
    extents=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 12), max_size=8),
)
def test_places_lie_apart_within_their_extents(extents, sizes):
    spots = place(extents, sizes)
    if spots is None:
        assert len(extents) > 1 or sum(sizes) > extents[0]
        return
    units = [(e, start + k) for (e, start), size in zip(spots, sizes, strict=True) for k in range(size)]
    assert len(set(units)) == sum(sizes)
    assert all(unit < extents[extent] for extent, unit in units)
    if len(extents) == 1:
        assert [start for _, start in spots] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_a_tensor_keeps_its_shape_and_is_aligned():
    pool, *_ = small_pool()
    tensors = [
        ((3, 5), torch.bfloat16),
        ((2, 3, 4), torch.float64),
        ((), torch.int64),
        ((0, 4), torch.float32),
    ]
    space = arena_of(pool).obtain(MemoryPurpose.STATE, tensors)
    assert space is not None
    for shape, dtype in tensors:
        tensor = space.carve(shape, dtype)
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.numel() == math.prod(shape)
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()


def test_what_can_never_be_had_is_refused_by_name():
    pool, *_ = small_pool()
    with pytest.raises(
        ConfigError, match=r"for the next micro-batch can never be had: .* on the host backing"
    ):
        arena_of(pool).obtain(MemoryPurpose.MICRO_BATCH, [((9 * 4 * CHUNK + 1,), torch.uint8)])
    assert arena_of(pool).obtain(MemoryPurpose.KEPT, [((9 * 4 * CHUNK + 1,), torch.uint8)]) is None

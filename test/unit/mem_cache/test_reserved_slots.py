"""Free slots that SGLang keeps for what requests are to decode count as in use."""

from __future__ import annotations

import pytest

from sglang_harli.core import MemoryPurpose
from support.pool_parts import small_geometry, small_pool

STRIPE = 64  # slots


def test_training_takes_what_is_left_beside_the_reserve():
    pool, slots, clock = small_pool(small_geometry(10))
    everything = len(pool.geometry.lendable)
    pool.reserved = lambda: 4 * STRIPE
    assert pool.lease(MemoryPurpose.STATE, "too much", everything) is None
    left = pool.free_slots // STRIPE
    assert left == (slots.available_size() - 4 * STRIPE) // STRIPE
    lease = pool.lease(MemoryPurpose.STATE, "all that is left", left)
    assert lease is not None and pool.free_slots < STRIPE
    assert pool.used_slots == 4 * STRIPE
    clock.now_s += 100.0
    assert pool.lease(MemoryPurpose.STATE, "one more", 1) is None
    pool.reserved = lambda: 0
    assert pool.lease(MemoryPurpose.STATE, "the reserve is gone", 1) is not None


def test_pages_of_broken_stripes_are_the_reserve_first():
    """A reserve costs no whole stripe as long as other free slots make it up."""
    pool, slots, _ = small_pool(small_geometry(10))
    taken = slots.alloc(3 * STRIPE)
    assert taken is not None
    slots.release(taken[::2])  # every second slot of three stripes
    whole = len(slots.free_stripes())
    pool.reserved = lambda: len(taken) // 2
    assert pool.lease(MemoryPurpose.STATE, "all", whole) is not None


def test_a_reserve_that_grows_into_what_training_has_is_given_back_ahead():
    pool, slots, clock = small_pool(small_geometry(24))
    pool.tick(pool.used_slots)
    lease = pool.lease(MemoryPurpose.KEPT, "kept", 10)
    assert lease is not None
    reserve = slots.available_size() - 11 * STRIPE
    pool.reserved = lambda: reserve  # as much as a wave of admissions makes it
    clock.now_s += 0.5
    pool.tick(pool.used_slots)
    assert pool.must_give() > 0


def test_the_figures_count_it_as_requests():
    pool, slots, _ = small_pool(small_geometry(10))
    before = pool.status()
    pool.reserved = lambda: 2 * STRIPE
    after = pool.status()
    reserve = 2 * STRIPE * pool.geometry.row_bytes * pool.geometry.buffers
    assert after["kv_bytes"] - before["kv_bytes"] == reserve == before["free_bytes"] - after["free_bytes"]
    pool.reserved = lambda: 10**9  # no more than there is
    assert pool.used_slots == slots.size and pool.status()["free_bytes"] == 0


def test_an_allocation_may_have_it_all_the_same():
    pool, slots, _ = small_pool(small_geometry(10))
    pool.reserved = lambda: 5 * STRIPE
    assert pool.lease(MemoryPurpose.STATE, "state", 2) is not None
    assert slots.alloc(slots.available_size()) is not None
    assert pool.reclaims == 1 and not pool.leases


@pytest.mark.parametrize("seconds", [5.0, 30.0])
def test_training_takes_nothing_while_it_is_held_off(seconds: float):
    """Behind a transfer that was given up, whose sender may still write."""
    pool, _, clock = small_pool(small_geometry(10))
    lease = pool.lease(MemoryPurpose.STATE, "before", 1)
    pool.hold_off(seconds)
    clock.now_s += seconds - 0.1
    assert pool.lease(MemoryPurpose.STATE, "during", 1) is None
    assert lease is not None and not lease.revoked
    clock.now_s += 0.2
    assert pool.lease(MemoryPurpose.STATE, "after", 1) is not None

"""The pool as a whole: leases, reclaim, watermarks, eviction, figures."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.host import POISON, HostBacking
from sglang_harli.mem_cache.lease import PoolLease
from sglang_harli.mem_cache.quota import UNUSED_S
from sglang_harli.mem_cache.unified_pool import EVICT_AGAIN_MOST_S, EVICT_AGAIN_S
from support.pool_parts import obtain, small_geometry, small_pool

STATE, BATCH, KEPT = MemoryPurpose.STATE, MemoryPurpose.MICRO_BATCH, MemoryPurpose.KEPT
STRIPE = 64  # slots


class PoolMachine(RuleBasedStateMachine):
    """Requests come and go, training leases and loses memory; every byte is followed, with debug
    mode on."""

    def __init__(self) -> None:
        super().__init__()
        self.geometry = small_geometry(7, buffers=2)
        self.pool, self.slots, self.clock = small_pool(self.geometry, debug=True)
        self.requests: list[tuple[int, list[int]]] = []  # (what its rows hold, slots)
        self.count = 0
        self.written: dict[str, int] = {}  # lease -> what its bytes hold
        self.kv = [
            self.pool.backing.kv_bytes(buffer).view(self.geometry.slots, self.geometry.row_bytes)
            for buffer in range(self.geometry.buffers)
        ]

    @rule(count=st.integers(1, 200))
    def request(self, count: int) -> None:
        able, physical = self.slots.available_size(), len(self.slots.free)
        reclaims = self.pool.reclaims
        taken = self.slots.alloc(count)
        assert (taken is None) == (count > able)
        assert self.pool.reclaims == reclaims + (taken is not None and count > physical)
        if taken is None:
            return
        assert all((kv[taken] != POISON).all() for kv in self.kv), "NaN in rows that a request was given"
        self.count += 1
        for kv in self.kv:
            kv[taken] = self.count % 200
        self.requests.append((self.count % 200, taken))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def finish(self, data: st.DataObject, keep: int) -> None:
        """Some of a request's slots may stay, as a cached prefix would."""
        value, taken = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.slots.release(taken[keep:])
        if taken[:keep]:
            self.requests.append((value, taken[:keep]))

    @rule(purpose=st.sampled_from(list(MemoryPurpose)), stripes=st.integers(1, 4))
    def lease(self, purpose: MemoryPurpose, stripes: int) -> None:
        free = self.slots.free_stripes()
        before = len(self.pool.leases)
        lease = obtain(self.pool, purpose, [((stripes * self.geometry.stripe_bytes,), torch.uint8)])
        if lease is None:
            now_s = self.clock()
            room = self.pool.quota.may_take(
                now_s=now_s, free_stripes=len(free), train_stripes=self.pool.train_stripes
            )
            assert room < stripes and len(self.pool.leases) == before
            return
        assert set(lease.stripes) == set(free[:stripes]), "not the highest"
        assert not self.pool.quota.cooling(self.clock())
        assert (lease.extents[0] == POISON).all()
        self.count += 1
        lease.extents[0].fill_(self.count % 200)
        self.written[lease.name] = self.count % 200

    @precondition(lambda self: self.pool.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease = self.pool.leases[data.draw(st.sampled_from(sorted(self.pool.leases)))]
        lease.give_back()
        lease.give_back()

    @rule(slots=st.integers(1, 500))
    def reclaim(self, slots: int) -> None:
        lent = self.pool.lent_slots
        assert min(slots, lent) <= self.pool.reclaim(slots) <= lent

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 20.0, 90.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.pool.tick(self.pool.used_slots, idle=True)

    @rule()
    def give_ahead(self) -> None:
        stripes, train = self.pool.must_give(), self.pool.train_stripes
        assert 0 <= stripes <= train
        if stripes:
            self.pool.relieve(stripes)
            assert self.pool.train_stripes <= train - stripes

    @invariant()
    def books_agree(self) -> None:
        pool, slots, geometry = self.pool, self.slots, self.geometry
        pool.check()
        assert set(pool.ledger.lent()) == slots.lent_stripes
        held = [s for _, taken in self.requests for s in taken]
        lent = [s for stripe in slots.lent_stripes for s in geometry.slots_of(stripe)]
        assert sorted([*held, *lent, *slots.free]) == list(range(1, geometry.slots))
        assert pool.used_slots == len(held) and pool.lent_slots == len(lent)
        status = pool.status()
        parts = [status["kv_bytes"], status["train_bytes"], status["free_bytes"]]
        assert sum(parts) == status["total_bytes"] == geometry.total_bytes and min(parts) >= 0
        assert sum(status["by_owner"].values()) == geometry.total_bytes
        assert status["moves"]["to_train"] - status["moves"]["to_kv"] == pool.train_stripes

    @invariant()
    def bytes_are_where_they_were_put(self) -> None:
        for value, taken in self.requests:
            assert all((kv[taken] == value).all() for kv in self.kv)
        for name, lease in self.pool.leases.items():
            assert (lease.extents[0] == self.written[name]).all()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def lease_of(pool, purpose: MemoryPurpose, stripes: int) -> PoolLease | None:
    return pool.lease(purpose, f"{purpose}-{len(pool.leases)}", stripes)


def fill(slots, stripes: int) -> list[int]:
    """Use the lowest slots, up to the end of so many stripes."""
    taken = slots.alloc(stripes * STRIPE - 1)
    assert taken is not None
    return taken


def test_training_alone_gets_all_that_can_be_lent():
    pool, slots, _ = small_pool()
    assert lease_of(pool, BATCH, 9) is not None
    assert pool.lent_slots == 9 * STRIPE and slots.available_size() == slots.size


def test_an_allocation_takes_back_what_it_needs_in_the_order_of_purposes():
    pool, slots, _ = small_pool()
    for purpose in (STATE, BATCH, KEPT):
        assert lease_of(pool, purpose, 2)
    physical = len(slots.free)
    assert slots.alloc(physical) is not None and pool.reclaims == 0
    assert slots.alloc(1) is not None
    assert [lease.purpose for lease in pool.leases.values()] == [STATE, BATCH]
    assert slots.alloc(2 * STRIPE) is not None
    assert [lease.purpose for lease in pool.leases.values()] == [STATE]
    assert slots.alloc(slots.available_size()) is not None
    assert not pool.leases and pool.reclaims == 3
    status = pool.status()
    assert status["reclaims"] == 3 and 0 < status["reclaim_ms"]["p50"] <= status["reclaim_ms"]["max"]


def test_after_a_reclaim_training_waits():
    pool, slots, clock = small_pool()
    assert lease_of(pool, BATCH, 8)
    slots.release(fill(slots, 4))
    assert not pool.leases and lease_of(pool, BATCH, 1) is None
    clock.now_s += 1.0
    assert lease_of(pool, BATCH, 8) is not None


def test_a_reclaim_that_training_refuses_is_logged_and_answered_honestly(caplog):
    pool, _, _ = small_pool()
    assert lease_of(pool, STATE, 3)
    pool.lend_to(lambda _stripes: None, None)
    with caplog.at_level(logging.ERROR):
        assert pool.reclaim(10) == 0
    assert "needs 10 slots" in caplog.text and "'state': 49152" in caplog.text
    assert pool.reclaim(0) == 0 and pool.reclaims == 0


def test_what_prompts_need_in_a_moment_is_a_reclaim_that_may_be_refused(caplog):
    pool, _, clock = small_pool()
    assert lease_of(pool, STATE, 3)
    assert pool.give_ahead(2, lambda stripes: None) == 0
    assert not pool.quota.cooling(clock()) and pool.reclaims == 0 and not caplog.records
    assert pool.give_ahead(5, pool.relieve) == 3 * STRIPE
    assert pool.quota.cooling(clock()) and pool.reclaims == 1
    assert pool.give_ahead(5, pool.relieve) == 0


def test_a_backing_that_cannot_take_back_leaves_the_lease_held():
    geometry = small_geometry()

    class Stuck(HostBacking):
        stuck = True

        def take_back(self, stripes, extents):
            if self.stuck:
                raise OSError("refused")
            super().take_back(stripes, extents)

    backing = Stuck(geometry)
    pool, slots, _ = small_pool(backing=backing)
    lease = lease_of(pool, BATCH, 2)
    assert lease is not None
    with pytest.raises(OSError, match="refused"):
        lease.give_back()
    assert not lease.revoked and lease.extents and slots.lent_stripes and pool.leases
    backing.stuck = False
    lease.give_back()
    assert lease.revoked and not slots.lent_stripes and not pool.leases


def test_the_cap_binds_and_may_be_lowered_while_more_is_lent():
    pool, _, _ = small_pool()
    pool.quota.max_train_bytes = 4 * pool.geometry.stripe_bytes
    lease = lease_of(pool, BATCH, 4)
    assert lease is not None and lease_of(pool, KEPT, 1) is None
    pool.quota.max_train_bytes = pool.geometry.stripe_bytes
    pool.tick(0, idle=True)
    assert lease_of(pool, KEPT, 1) is None
    lease.give_back()
    assert lease_of(pool, BATCH, 2) is None and lease_of(pool, BATCH, 1) is not None


def grow(pool, slots, clock, stripes: int) -> list[int]:
    """The KV cache grows by so many stripes in half a second."""
    pool.tick(pool.used_slots)
    taken = fill(slots, stripes)
    clock.now_s += 0.5
    pool.tick(pool.used_slots)
    return taken


def test_growth_is_watched_and_memory_given_back_ahead_of_need():
    pool, slots, clock = small_pool(small_geometry(18))
    grow(pool, slots, clock, 2)
    assert (pool.quota.watermarks.low, pool.quota.watermarks.high) == (2, 4)
    assert lease_of(pool, BATCH, 13) is None  # 16 are free, four stay free
    assert lease_of(pool, BATCH, 12) is not None
    assert pool.must_give() == 0 and pool.free_slots // STRIPE == 4
    slots.alloc(3 * STRIPE)
    assert pool.must_give() == 3
    assert pool.quota.cooling(clock()), "what was given ahead of need is not taken again at once"


def cache_of(slots, stripes: list[int]):
    """Cached prefixes that fill these stripes, and an eviction of the highest of them."""
    cached = sorted(stripes)
    for stripe in cached:
        slots.free.difference_update(slots.geometry.slots_of(stripe))
    asked: list[int] = []

    def evict(wanted: int, _unused_since_s: float | None) -> int:
        asked.append(wanted)
        gone = [cached.pop() for _ in range(min(wanted, len(cached)))]
        for stripe in gone:
            slots.free.update(slots.geometry.slots_of(stripe))
        return len(gone)

    return evict, asked


def test_cached_prefixes_go_for_state_and_batches_but_not_for_kept_activations():
    pool, slots, _ = small_pool()
    evict, asked = cache_of(slots, [3, 4, 5, 6, 7, 8, 9])
    pool.lend_to(pool.relieve, evict)
    assert lease_of(pool, KEPT, 3) is None and not asked
    assert lease_of(pool, BATCH, 5) is not None
    assert asked == [3] and slots.free_stripes() == []
    assert lease_of(pool, STATE, 20) is None and asked == [3], "above the cap nothing is evicted"
    assert lease_of(pool, STATE, 4) is not None and asked == [3, 4]


def test_unused_prefixes_are_not_kept_against_a_lease_but_against_a_watermark():
    pool, slots, clock = small_pool(small_geometry(18))
    grow(pool, slots, clock, 2)
    evict, _ = cache_of(slots, list(range(4, 18)))
    told: list[float | None] = []

    def told_evict(wanted: int, unused_since_s: float | None) -> int:
        told.append(unused_since_s)
        return evict(wanted, unused_since_s)

    pool.lend_to(pool.relieve, told_evict)
    assert lease_of(pool, BATCH, 1) is not None
    assert told == [clock.now_s - UNUSED_S]
    slots.alloc(2 * STRIPE)
    pool.tick(pool.used_slots)
    assert told[1:] == [None]


def test_an_eviction_that_gave_too_little_is_not_repeated_at_once():
    pool, slots, clock = small_pool()
    evict, asked = cache_of(slots, [9])
    pool.lend_to(pool.relieve, evict)
    slots.free.difference_update(range(STRIPE * 8))
    assert lease_of(pool, BATCH, 3) is None
    assert lease_of(pool, BATCH, 3) is None and asked == [2]
    clock.now_s += 2 * EVICT_AGAIN_S
    assert lease_of(pool, BATCH, 3) is None and asked == [2, 1]


def test_it_is_told_when_no_prefix_can_make_way():
    pool, slots, clock = small_pool()
    evict, asked = cache_of(slots, [])
    pool.lend_to(pool.relieve, evict)
    slots.free.clear()
    assert lease_of(pool, BATCH, 3) is None
    assert len(asked) == 1 and not pool.nothing_to_evict, "the prefixes may still be being counted"
    clock.now_s += 3 * EVICT_AGAIN_S
    assert lease_of(pool, BATCH, 3) is None and pool.nothing_to_evict
    evict, _ = cache_of(slots, [9])
    pool.lend_to(pool.relieve, evict)
    clock.now_s += EVICT_AGAIN_MOST_S
    assert lease_of(pool, BATCH, 3) is None and not pool.nothing_to_evict


def test_looks_at_prefixes_that_give_nothing_become_seldom():
    pool, slots, clock = small_pool()
    evict, asked = cache_of(slots, [])
    pool.lend_to(pool.relieve, evict)
    slots.free.clear()
    for _ in range(1000):
        clock.now_s += 0.01
        assert lease_of(pool, BATCH, 3) is None
    assert 8 <= len(asked) <= 16, "ten seconds, a thousand turns"
    evict, asked = cache_of(slots, [9])
    pool.lend_to(pool.relieve, evict)
    clock.now_s += EVICT_AGAIN_MOST_S
    assert lease_of(pool, BATCH, 3) is None
    clock.now_s += 1.5 * EVICT_AGAIN_S
    assert lease_of(pool, BATCH, 3) is None and len(asked) == 2, "what gives something is asked again soon"


def test_cached_prefixes_keep_the_high_watermark_free_while_training_holds_memory():
    pool, slots, clock = small_pool(small_geometry(18))
    taken = grow(pool, slots, clock, 2)
    evict, asked = cache_of(slots, list(range(4, 18)))
    pool.lend_to(pool.relieve, evict)
    pool.tick(pool.used_slots)
    assert not asked, "training holds nothing: the cache is SGLang's own affair"
    assert lease_of(pool, BATCH, 1) is not None  # evicts three: one to lend, four stay free
    high = pool.quota.watermarks.high
    asked.clear()
    slots.alloc(STRIPE)
    pool.tick(pool.used_slots)
    assert not asked and pool.free_slots // STRIPE == high - 1
    slots.alloc(STRIPE)
    pool.tick(pool.used_slots)
    assert asked == [2] and pool.free_slots // STRIPE == high
    assert pool.must_give() == 0 and pool.leases
    slots.release(taken)


def test_a_backing_without_room_gives_no_lease_and_loses_nothing(caplog):
    geometry = small_geometry()

    class Scattered(HostBacking):
        def lend(self, stripes):
            raise MemoryError("no place in a row")

    pool, slots, _ = small_pool(backing=Scattered(geometry))
    with caplog.at_level(logging.WARNING):
        assert lease_of(pool, BATCH, 2) is None
    assert "no place in a row" in caplog.text
    pool.check()
    assert not slots.lent_stripes and not pool.leases and len(slots.free) == slots.size


def test_status_in_bytes():
    pool, slots, clock = small_pool(small_geometry(18))
    grow(pool, slots, clock, 2)
    lease_of(pool, STATE, 1)
    lease_of(pool, BATCH, 2)
    status, stripe = pool.status(), pool.geometry.stripe_bytes
    assert status["by_owner"] == {
        "kv": status["total_bytes"] - 3 * stripe,
        "kept": 0,
        "micro_batch": 2 * stripe,
        "state": stripe,
    }
    assert status["kv_bytes"] == 2 * stripe  # two stripes, the padded slot among them
    assert status["watermarks"] == {"low": 2 * stripe, "high": 4 * stripe}
    assert status["moves"] == {"to_train": 3, "to_kv": 0}
    assert (status["backing"], status["stripe_bytes"], status["max_train_bytes"]) == ("host", stripe, None)
    assert status["reclaim_ms"] == {"p50": 0.0, "max": 0.0, "last": 0.0}


@pytest.mark.parametrize("amplitude", [8, 20])  # stripes of 33; with the lease of 16 they fit, or do not
def test_an_oscillating_load_moves_a_lease_twice_at_most(amplitude):
    pool, slots, clock = small_pool(small_geometry(33))
    taken: list[int] = []
    for tenth in range(600):
        clock.now_s += 0.1
        if tenth % 20 == 0:
            taken = slots.alloc(amplitude * STRIPE) or []
        elif tenth % 20 == 10:
            slots.release(taken)
            taken = []
        pool.tick(pool.used_slots)
        if stripes := pool.must_give():
            pool.relieve(stripes)
        if not pool.leases:
            obtain(pool, BATCH, [((16 * pool.geometry.stripe_bytes,), torch.uint8)])
    assert pool.ledger.moves_to_train <= 2 * 16, "thirty waves"

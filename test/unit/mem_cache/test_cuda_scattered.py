"""A pool whose free stripes lie apart: what could ever be had is had once serving lets go, and what
could not is refused at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.core import MemoryPurpose
from sglang_harli.errors import ConfigError
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.lease import PoolLease
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.cuda.cuda_driver_double import DriverDouble
from support.pool_parts import POOLS, Clock, Slots

STRIPES = 12
GEOMETRY = PoolGeometry(16 * STRIPES, 512, buffers=4, page_size=1, stripe_slots=16)
STRIPE = GEOMETRY.stripe_bytes
TRIES = 8 * STRIPES


@contextmanager
def backing_of(kind: str) -> Iterator[Backing]:
    if kind == "static":
        yield StaticBacking(GEOMETRY, "cpu")
        return
    driver = DriverDouble()
    backing = AliasedBacking(GEOMETRY, torch.device("cpu"), driver, lambda: [1, 2])
    yield backing
    backing.close()
    driver.close()


class Serving:
    """Stripes that requests hold, and those of cached prefixes, which may be evicted; a look at
    them takes two calls, as on a device."""

    def __init__(self, backing: Backing, running: set[int], cached: set[int]) -> None:
        self.clock = Clock()
        self.slots = Slots(lambda slots: UnifiedPool(GEOMETRY, backing, slots, clock=self.clock))
        POOLS.add(self.slots.pool)
        self.running, self.cached = running, cached
        for stripe in running | cached:
            self.slots.free.difference_update(GEOMETRY.slots_of(stripe))
        self.evicted = 0
        self._look: list[int] | None = None
        self.slots.pool.lend_to(lambda stripes: None, self.evict)

    def evict(self, stripes: int, unused_since_s: float | None, among: Sequence[int] | None = None) -> int:
        if self._look is None:
            self._look = [s for s in sorted(self.cached) if among is None or s in among]
            return 0
        look, self._look = self._look[:stripes], None
        for stripe in look:
            self.cached.remove(stripe)
            self.slots.release(list(GEOMETRY.slots_of(stripe)))
        self.evicted += len(look)
        return len(look)

    def end_requests(self) -> None:
        for stripe in self.running:
            self.slots.release(list(GEOMETRY.slots_of(stripe)))
        self.running = set()

    def try_for(self, arena: TrainArena, sizes: Sequence[int], tries: int = TRIES) -> PoolLease | None:
        specs = [((size,), torch.uint8) for size in sizes]
        for _ in range(tries):
            self.clock.now_s += 2
            if (lease := arena.obtain(MemoryPurpose.MICRO_BATCH, specs)) is not None:
                return lease
        return None


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["aliased", "static"]),
    owners=st.lists(st.sampled_from(["free", "running", "cached"]), min_size=11, max_size=11),
    sizes=st.lists(st.integers(1, 4 * STRIPE), min_size=1, max_size=4),
)
def test_what_can_ever_be_had_is_had_when_serving_lets_go(kind, owners, sizes):
    running = {n for n, owner in enumerate(owners, 1) if owner == "running"}
    cached = {n for n, owner in enumerate(owners, 1) if owner == "cached"}
    with backing_of(kind) as backing:
        serving = Serving(backing, running, cached)
        arena = TrainArena(serving.slots.pool)
        specs = [((size,), torch.uint8) for size in sizes]
        if not arena.could_ever_obtain(specs):
            with pytest.raises(ConfigError, match="can never be had"):
                serving.try_for(arena, sizes)
            return
        lease = serving.try_for(arena, sizes)
        if lease is None:
            serving.end_requests()
            lease = serving.try_for(arena, sizes)
        assert lease is not None, "it waits for ever"
        for number, size in enumerate(sizes):
            lease.carve((size,), torch.uint8).fill_(number)
        lease.give_back()


def test_prefixes_between_free_stripes_go_and_others_stay():
    """5 and 9 stand alone among the free ones: a run of three needs one of them, not both."""
    with backing_of("aliased") as backing:
        serving = Serving(backing, running={1, 2, 3, 7}, cached={5, 9})
        arena = TrainArena(serving.slots.pool)
        lease = serving.try_for(arena, [3 * STRIPE], tries=4)
        assert lease is not None and sorted(lease.stripes) == [9, 10, 11]
        assert serving.evicted == 1 and serving.cached == {5}
        lease.give_back()


def test_a_lease_takes_the_shortest_row_that_is_long_enough():
    with backing_of("aliased") as backing:
        serving = Serving(backing, running={5, 8}, cached=set())
        arena = TrainArena(serving.slots.pool)
        two = serving.try_for(arena, [STRIPE, STRIPE])
        assert two is not None and sorted(two.stripes) == [6, 7] and len(two.extents) == 1
        one = serving.try_for(arena, [STRIPE // 2])
        assert one is not None and one.stripes == (11,)  # of 9 to 11, so that 1 to 4 stay whole
        four = serving.try_for(arena, [4 * STRIPE])
        assert four is not None and sorted(four.stripes) == [1, 2, 3, 4]
        assert not arena.scattered
        with pytest.raises(ConfigError):
            serving.try_for(arena, [12 * STRIPE])
        assert arena.obtain(MemoryPurpose.KEPT, [((STRIPE,), torch.uint8)]) is not None
        assert serving.slots.pool.lease(MemoryPurpose.KEPT, "more", 2) is None
        for lease in list(serving.slots.pool.leases.values()):
            lease.give_back()


def test_kept_activations_evict_nothing():
    with backing_of("aliased") as backing:
        serving = Serving(backing, running={2, 4, 8}, cached={6, 10})
        arena = TrainArena(serving.slots.pool)
        specs = [((2 * STRIPE,), torch.uint8)]
        for _ in range(TRIES):
            serving.clock.now_s += 2
            assert arena.obtain(MemoryPurpose.KEPT, specs) is None
        assert arena.scattered and serving.evicted == 0

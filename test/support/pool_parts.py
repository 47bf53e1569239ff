"""What the pool's tests share: a small pool, and a slot allocator that one can see through."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sglang_harli.core import MemoryPurpose
from sglang_harli.errors import ConfigError
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.lease import PoolLease
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.mem_cache.unified_pool import SlotSource, UnifiedPool
from sglang_harli.train_memory import Specs


def small_geometry(stripes: int = 10, *, buffers: int = 4, tail: int = 17) -> PoolGeometry:
    """Stripes of 64 slots, one OS page in each buffer, and a tail that fills none."""
    return PoolGeometry(
        slots=64 * stripes + tail, row_bytes=64, buffers=buffers, page_size=1, stripe_slots=64
    )


POOLS: weakref.WeakSet[UnifiedPool] = weakref.WeakSet()  # made since it was cleared


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Slots:
    """A slot allocator with its free slots in a set: lowest first, lent ones available, reclaimed
    when short."""

    def __init__(self, make_pool: Callable[[SlotSource], UnifiedPool]) -> None:
        self.pool = make_pool(self)
        self.geometry = self.pool.geometry
        self.size = self.geometry.slots - self.geometry.page_size
        self.free = set(range(self.geometry.page_size, self.geometry.slots))
        self.lent_stripes: set[int] = set()

    def available_size(self) -> int:
        return len(self.free) + len(self.lent_stripes) * self.geometry.stripe_slots

    def free_stripes(self) -> list[int]:
        return [
            s for s in reversed(self.geometry.lendable) if self.free.issuperset(self.geometry.slots_of(s))
        ]

    def withdraw(self, stripes: Sequence[int]) -> None:
        for stripe in stripes:
            slots = set(self.geometry.slots_of(stripe))
            assert slots <= self.free and stripe not in self.lent_stripes
            self.free -= slots
            self.lent_stripes.add(stripe)

    def restore(self, stripes: Sequence[int]) -> None:
        for stripe in stripes:
            self.lent_stripes.remove(stripe)
            assert self.free.isdisjoint(self.geometry.slots_of(stripe))
            self.free.update(self.geometry.slots_of(stripe))

    def alloc(self, count: int) -> list[int] | None:
        if count > self.available_size():
            return None
        if count > len(self.free):
            self.pool.reclaim(count - len(self.free))
        taken = sorted(self.free)[:count]
        assert len(taken) == count, "reclaim gave too little"
        self.free.difference_update(taken)
        return taken

    def release(self, slots: Sequence[int]) -> None:
        assert self.free.isdisjoint(slots)
        self.free.update(slots)


class IdleSlots:
    """A slot allocator with nothing to serve: every stripe that is not lent is free."""

    def __init__(self, geometry: PoolGeometry) -> None:
        self.geometry = geometry
        self.size = geometry.slots - geometry.page_size
        self.free = set(geometry.lendable)

    def available_size(self) -> int:
        return self.size

    def free_stripes(self) -> list[int]:
        return sorted(self.free, reverse=True)

    @property
    def lent_stripes(self) -> set[int]:
        return set(self.geometry.lendable) - self.free

    def withdraw(self, stripes: Sequence[int]) -> None:
        self.free -= set(stripes)

    def restore(self, stripes: Sequence[int]) -> None:
        self.free |= set(stripes)


def give_back_in_order(pool: UnifiedPool) -> None:
    """Stands for the pressure ladder: leases go whole, in the order of their purposes, until it is
    enough."""
    order = list(MemoryPurpose)

    def pressure(stripes: int) -> None:
        freed = 0
        for lease in sorted(pool.leases.values(), key=lambda lease: order.index(lease.purpose)):
            if freed >= stripes:
                return
            freed += len(lease.stripes)
            lease.give_back()

    pool.lend_to(pressure, None)


def small_pool(
    geometry: PoolGeometry | None = None, *, backing: Backing | None = None, debug: bool = True
) -> tuple[UnifiedPool, Slots, Clock]:
    """A pool on the host with a ladder that gives everything."""
    geometry, clock = geometry or small_geometry(), Clock()
    memory = backing or HostBacking(geometry, debug=debug)
    slots = Slots(lambda slots: UnifiedPool(geometry, memory, slots, clock=clock))
    POOLS.add(slots.pool)
    give_back_in_order(slots.pool)
    return slots.pool, slots, clock


@functools.lru_cache(maxsize=4)
def arena_of(pool: UnifiedPool) -> TrainArena:
    """The one that gives this pool's leases their names."""
    return TrainArena(pool)


def obtain(pool: UnifiedPool, purpose: MemoryPurpose, specs: Specs) -> PoolLease | None:
    """As training does; None: not now, or never."""
    try:
        return arena_of(pool).obtain(purpose, specs)
    except ConfigError:
        assert not arena_of(pool).could_ever_obtain(specs)
        return None


def all_free_pages(slots: Any) -> list[int]:
    """Pages in the lists of one of SGLang's allocators, those that were freed since included."""
    from support.model_runner import NEWEST

    if NEWEST:
        return slots.get_all_free_pages().tolist()
    return [*slots.free_pages.tolist(), *slots.release_pages.tolist()]

"""The idle check compares ledger, leases, slot allocator and backing: each pair that disagrees is
found and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.chunk_ledger import LedgerError
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.pool_parts import POOLS, Slots, small_geometry, small_pool

Break = Callable[[UnifiedPool, Slots], object]


def lent_pool(backing: Backing) -> tuple[UnifiedPool, Slots]:
    pool, slots, _ = small_pool(backing=backing)
    assert pool.lease(MemoryPurpose.STATE, "a", 2) is not None
    assert pool.lease(MemoryPurpose.KEPT, "b", 1) is not None
    pool.check()
    POOLS.discard(pool)  # it is broken on purpose, and not looked at after the test
    return pool, slots


def backings() -> list[Backing]:
    geometry = small_geometry()
    return [HostBacking(geometry), StaticBacking(geometry, "cpu")]


BREAKS: dict[str, tuple[Break, str]] = {
    "the allocator has a lent stripe": (
        lambda pool, slots: slots.lent_stripes.discard(9),
        r"the ledger and the slot allocator differ on whether stripes \[9\] are lent",
    ),
    "the allocator lends one more": (
        lambda pool, slots: slots.lent_stripes.add(1),
        r"the slot allocator differ on whether stripes \[1\]",
    ),
    "a lease is forgotten": (
        lambda pool, slots: pool.leases.pop("b"),
        r"the ledger and the leases differ on whether stripes \[7\]",
    ),
    "a lease is of other stripes": (
        lambda pool, slots: setattr(pool.leases["b"], "stripes", (1,)),
        r"lease 'b' is of stripes \(1,\), in the ledger of \(7,\)",
    ),
    "a lease was given back and is held": (
        lambda pool, slots: setattr(pool.leases["b"], "revoked", True),
        "lease 'b'",
    ),
    "the ledger forgot a lease": (
        lambda pool, slots: pool.ledger.give_back("b"),
        "lease 'b' is of stripes",
    ),
    "the backing took memory back": (
        lambda pool, slots: pool.backing.take_back(pool.leases["b"].stripes, pool.leases["b"].extents),
        r"the ledger and the backing differ on whether stripes \[7\]",
    ),
    "the backing lends one more": (
        lambda pool, slots: pool.backing.lend([1]),
        r"the backing differ on whether stripes \[1\]",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_each_pair_that_disagrees_is_named(what: str):
    for backing in backings():
        pool, slots = lent_pool(backing)
        spoil, says = BREAKS[what]
        spoil(pool, slots)
        with pytest.raises(LedgerError, match=says):
            pool.check()
        with pytest.raises(LedgerError):
            pool.tick(0, idle=True)

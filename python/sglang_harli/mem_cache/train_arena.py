"""Training's leases in the pool: which stripes hold tensors of these sizes, if any ever can."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sglang_harli.config import show_size
from sglang_harli.core import MemoryPurpose
from sglang_harli.errors import ConfigError
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.geometry import runs_of
from sglang_harli.mem_cache.lease import PoolLease, place
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.train_memory import Specs, carved_bytes


class TrainArena:
    """The unified pool as training's memory (``TrainMemory``); refuses what a run can never have.
    Several extents may hold less than their sum."""

    def __init__(self, pool: UnifiedPool) -> None:
        self._pool = pool
        self._count = itertools.count(1)
        self._possible: tuple[object, int] | None = None  # the last tensors found possible, and the cap then

    @property
    def scattered(self) -> bool:
        """See ``TrainMemory``."""
        return self._pool.scattered

    def obtain(self, purpose: MemoryPurpose, specs: Specs) -> PoolLease | None:
        """A lease in which these tensors can be carved in this order; None: not now.

        Raises:
            ConfigError: the pool can never hold them; not for kept activations, which are optional.
        """
        lease = self._lease(purpose, specs)
        if lease is None and purpose is not MemoryPurpose.KEPT:
            self._check_possible(purpose, specs)
        return lease

    def _lease(self, purpose: MemoryPurpose, specs: Specs) -> PoolLease | None:
        geometry, pool = self._pool.geometry, self._pool
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        least = max(geometry.stripes_for(sum(sizes)), 1)

        def choose(free: Sequence[int], allowed: int) -> Sequence[int] | None:
            return _fewest_stripes(pool.backing, sizes, free, least, allowed)

        lease = pool.lease(
            purpose,
            f"{purpose}-{next(self._count)}",
            least,
            choose=None if pool.backing.contiguous else choose,
        )
        if lease is not None and not lease.plan(specs):
            lease.give_back()  # the backing's extents are not those that were foreseen
            return None
        return lease

    def _check_possible(self, purpose: MemoryPurpose, specs: Specs) -> None:
        pool = self._pool
        asked = (tuple((tuple(shape), dtype) for shape, dtype in specs), pool.quota.max_stripes)
        if asked == self._possible:
            return
        if not self.could_ever_obtain(specs):
            nbytes = sum(carved_bytes(shape, dtype) for shape, dtype in specs)
            most = pool.quota.max_stripes * pool.geometry.stripe_bytes
            raise ConfigError(
                f"{show_size(nbytes)} for {purpose.text} can never be had: the pool lends at most {show_size(most)}, "
                f"on the {pool.backing.name} backing: lower batch_size, max_seq_length or lora_r",
                code="memory_budget",
                param="batch_size",
            )
        self._possible = asked

    def could_ever_obtain(self, specs: Specs) -> bool:
        """Whether these tensors fit within the cap when the KV cache uses nothing."""
        pool, geometry = self._pool, self._pool.geometry
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        least, most = max(geometry.stripes_for(sum(sizes)), 1), pool.quota.max_stripes
        if pool.backing.contiguous:
            return least <= most
        free = list(reversed(geometry.lendable))
        return _fewest_stripes(pool.backing, sizes, free, least, most) is not None


def _fewest_stripes(
    backing: Backing, sizes: Sequence[int], free: Sequence[int], least: int, allowed: int
) -> Sequence[int] | None:
    """The fewest stripes whose extents hold such tensors: in a row, of the shortest row that is
    long enough, so that long ones last; else of the highest ones or, where those are scattered too
    much, of the longest rows; None: ``allowed`` do not suffice."""
    if allowed < least:
        return None
    if not sizes:
        return free[:least]

    def suffice(stripes: Sequence[int]) -> bool:
        return place(backing.extent_bytes(stripes), sizes) is not None

    runs = runs_of(free)
    rows = [run for run in runs if len(run) >= least]
    if rows:
        shortest = min(rows, key=lambda run: (len(run), -run.start))
        if suffice(row := shortest[: -least - 1 : -1]):
            return row
    longest_first = sorted(runs, key=lambda run: (-len(run), -run.start))
    best: Sequence[int] | None = None
    for candidates in (free, [stripe for run in longest_first for stripe in reversed(run)]):
        high = min(allowed, len(candidates))  # suffices
        low = least - 1  # does not
        if high <= low or not suffice(candidates[:high]):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if suffice(candidates[:middle]) else (middle, high)
        if best is None or high < len(best):
            best = candidates[:high]
    return best

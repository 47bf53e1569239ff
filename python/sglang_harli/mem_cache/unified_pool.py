"""One pool of memory for the KV cache and for training (docs/internals/memory.md).

SGLang counts lent slots as available, because a lease is revocable at any allocation: its allocator
calls ``reclaim`` inline when it runs short of pages. Used from the scheduler's thread alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.chunk_ledger import ChunkLedger, LedgerError
from sglang_harli.mem_cache.geometry import PoolGeometry, fullest_window
from sglang_harli.mem_cache.lease import PoolLease
from sglang_harli.mem_cache.quota import UNUSED_S, Quota

logger = logging.getLogger(__name__)

RECLAIMS_KEPT = 512  # latencies of the last ones
EVICT_AGAIN_S = 0.02  # after an eviction of prefixes that gave too little; doubled while they give nothing,
EVICT_AGAIN_MOST_S = 1.28  # up to this: a look at the prefixes takes the scheduler milliseconds

Chooser = Callable[[Sequence[int], int], Sequence[int] | None]
Relieve = Callable[[int], None]


class Evict(Protocol):
    """Evicts cached prefixes for n stripes: those above the kept share, and below it those unused
    since a moment of the clock, if given; ``among``: the stripes that are wanted, if not any."""

    def __call__(self, stripes: int, unused_since_s: float | None, among: Sequence[int] | None = None) -> int:
        """The stripes that became free."""
        ...


class SlotSource(Protocol):
    """The slot allocator, as the pool sees it."""

    size: int  # slots, without the padded page
    lent_stripes: set[int]  # withdrawn, and not restored yet

    def available_size(self) -> int:
        """Slots that requests may have, lent ones included."""
        ...

    def free_stripes(self) -> list[int]:
        """Lendable stripes known to be wholly free, highest first; never waits for the device."""
        ...

    def withdraw(self, stripes: Sequence[int]) -> None:
        """Take stripes just named free out of the free list; never waits for the device."""
        ...

    def restore(self, stripes: Sequence[int]) -> None:
        """Put the pages of these stripes back into the free list."""
        ...


class UnifiedPool:
    """The pool: ledger, quota, backing and slots together.

    Args:
        slots: the slot allocator; it may still be under construction, nothing is asked of it yet.
        max_train_bytes, prefix_keep: see ``Quota``.
        clock: seconds, monotonic.

    Attributes:
        reserved: free slots that count as in use: SGLang keeps them for what requests are to
            decode.
        leases: those held, by name.
        scattered: enough stripes were free for the last lease, but not in a row.
        reclaims: how often requests took memory back, in an allocation or just before it.
        reclaim_seconds: how long the last ones took.
    """

    def __init__(
        self,
        geometry: PoolGeometry,
        backing: Backing,
        slots: SlotSource,
        *,
        max_train_bytes: int | None = None,
        prefix_keep: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.geometry, self.backing, self.slots = geometry, backing, slots
        self.ledger = ChunkLedger(geometry)
        self.quota = Quota(geometry, max_train_bytes=max_train_bytes, prefix_keep=prefix_keep)
        self.relieve: Relieve = lambda _stripes: None  # before training may borrow
        self.reserved: Callable[[], int] = lambda: 0
        self.evict: Evict | None = None
        self.leases: dict[str, PoolLease] = {}
        self._edit_under: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.scattered = False
        self._joins = 0  # tries in a row to get stripes in a row
        self._barren: set[int] = set()  # first stripes of places where that gave nothing
        self.reclaims = 0
        self.reclaim_seconds: deque[float] = deque(maxlen=RECLAIMS_KEPT)
        self._clock = clock
        self._evict_again_s = 0.0  # not before
        self._evict_pause_s = EVICT_AGAIN_S
        self._evicted_nothing = 0  # times in a row

    def lend_to(
        self,
        relieve: Relieve,
        evict: Evict | None,
        edit_under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Training may ask for leases from now on.

        Args:
            relieve: frees at least n stripes now, by leases that training gives back; cannot
                refuse.
            evict: see ``Evict``; None: no prefix is cached.
            edit_under: on a device the stream on which SGLang edits its slot lists: there they are
                edited here too, whatever the caller's is.
        """
        self._edit_under = edit_under
        self.relieve, self.evict = relieve, evict

    # ------------------------------------------------------------------ figures
    @property
    def train_stripes(self) -> int:
        return self.ledger.train_stripes

    @property
    def lent_slots(self) -> int:
        """Slots whose memory training holds.  SGLang counts them as available."""
        return self.ledger.train_stripes * self.geometry.stripe_slots

    @property
    def used_slots(self) -> int:
        """Slots of requests and cached prefixes, and those reserved for requests."""
        available = self.slots.available_size()
        return self.slots.size - available + min(self.reserved(), available)

    @property
    def free_slots(self) -> int:
        """Slots that can be had without a reclaim, but for the reserved ones."""
        return max(self.slots.available_size() - self.lent_slots - self.reserved(), 0)

    # ------------------------------------------------------------------ training takes and gives
    def lease(
        self, purpose: MemoryPurpose, name: str, stripes_needed: int, *, choose: Chooser | None = None
    ) -> PoolLease | None:
        """Lend at least ``stripes_needed`` to training, if the quota allows it; None: not now.

        Cached prefixes above the kept share, and those unused for ``UNUSED_S``, are evicted for it
        where needed; not for kept activations, which save work but are not needed.

        Args:
            name: not in use in the ledger.
            choose: picks of the free stripes (highest first), at most as many as its second
                argument, or None; default: the first ``stripes_needed``.
        """
        with self._edit_under():
            may_evict = purpose is not MemoryPurpose.KEPT
            stripes = self._pick(stripes_needed, choose, may_evict=may_evict)
            return self._lend(purpose, name, stripes) if stripes else None

    def _pick(self, needed: int, choose: Chooser | None, *, may_evict: bool) -> tuple[int, ...]:
        """Free stripes that may be taken; none: not now."""
        self.scattered = False
        allowed, free = self._takeable(needed, may_evict=may_evict)
        if allowed < needed:
            return ()
        if choose is None:
            return tuple(free[:needed])
        stripes = choose(free, allowed)
        if not stripes and may_evict and self._join(needed, free):
            free = self.slots.free_stripes()
            allowed = self._may_take(self._clock(), free)
            stripes = choose(free, allowed)
        self.scattered = not stripes
        return tuple(stripes or ())

    def _join(self, length: int, free: Sequence[int]) -> bool:
        """Evict prefixes for ``length`` free stripes in a row; whether any stripe became free.

        First those in the fullest place that was not tried in vain, then those that may go
        anywhere; each twice, as on a device the first try gives nothing while they are counted.
        """
        lent = set(self.slots.lent_stripes)
        window = fullest_window(self.geometry.lendable, lent, set(free), length, self._barren)
        among = window if window is not None and self._joins % 4 < 2 else None
        freed = self._evict_prefixes(self._clock(), length, self._clock() - UNUSED_S, among=among)
        if freed is None:
            return False
        if freed:
            self._joins, self._barren = 0, set()
            return True
        self._joins += 1
        if self._joins % 4 == 0:
            self._barren = set() if window is None else self._barren | {window.start}
        return False

    def _lend(self, purpose: MemoryPurpose, name: str, stripes: tuple[int, ...]) -> PoolLease | None:
        self.slots.withdraw(stripes)
        self.ledger.lend(name, stripes, quota=self.quota.max_stripes)
        try:
            extents = self.backing.lend(stripes)
        except MemoryError as error:
            logger.warning("harli: the pool could not lend %d stripes: %s", len(stripes), error)
            self.ledger.give_back(name)
            self.slots.restore(stripes)
            return None
        lease = self.leases[name] = PoolLease(purpose, name, stripes, extents, self.release)
        return lease

    def _takeable(self, wanted: int, *, may_evict: bool) -> tuple[int, list[int]]:
        """How many stripes may be taken, and the free ones, counted only where it can matter."""
        now_s, train = self._clock(), self.train_stripes
        if self.quota.cooling(now_s) or train + wanted > self.quota.max_stripes:
            return 0, []
        may_evict = may_evict and self._can_evict(now_s)
        if not may_evict and self.free_slots // self.geometry.stripe_slots < wanted:
            return 0, []
        free = self.slots.free_stripes()
        allowed = self._may_take(now_s, free)
        if (
            allowed < wanted
            and may_evict
            and self._evict_prefixes(now_s, wanted + self.quota.watermarks.high - len(free), now_s - UNUSED_S)
        ):
            free = self.slots.free_stripes()
            allowed = self._may_take(now_s, free)
        return allowed, free

    def _may_take(self, now_s: float, free: Sequence[int]) -> int:
        """How many of these wholly free stripes may be taken; what is reserved stays, first in
        stripes that are free in part."""
        spare = min(len(free), self.free_slots // self.geometry.stripe_slots)
        return self.quota.may_take(now_s=now_s, free_stripes=spare, train_stripes=self.train_stripes)

    def hold_off(self, seconds: float) -> None:
        """Training takes nothing more for a while; what it has it keeps."""
        self.quota.hold_off(self._clock() + seconds)

    def _can_evict(self, now_s: float) -> bool:
        return self.evict is not None and now_s >= self._evict_again_s

    def _evict_prefixes(
        self,
        now_s: float,
        stripes: int,
        unused_since_s: float | None = None,
        *,
        among: Sequence[int] | None = None,
    ) -> int | None:
        """Evict cached prefixes, and how many stripes became free; not again at once where that
        gave too little (None)."""
        if self.evict is None or not self._can_evict(now_s):
            return None
        used = self.used_slots
        with self._edit_under():
            asked = {} if among is None else {"among": among}
            freed = self.evict(stripes, unused_since_s, **asked)
        self.quota.evicted(used - self.used_slots)
        if freed:
            self._evict_pause_s = EVICT_AGAIN_S
        if freed < stripes:
            self._evict_again_s = now_s + self._evict_pause_s
        self._evicted_nothing = 0 if freed else self._evicted_nothing + 1
        if not freed:
            self._evict_pause_s = min(2 * self._evict_pause_s, EVICT_AGAIN_MOST_S)
        return freed

    @property
    def nothing_to_evict(self) -> bool:
        """Whether no cached prefix could make way when that was tried last: once is no answer, as
        on a device a try gives nothing while the prefixes are being counted."""
        return self.evict is not None and self._evicted_nothing >= 2

    def release(self, lease: PoolLease) -> None:
        """End a lease: memory to the KV cache, slots to the allocator. May be repeated."""
        if lease.revoked:
            return
        with self._edit_under():
            self.backing.take_back(lease.stripes, lease.extents)  # what it raises leaves the lease as it was
            lease.revoked, lease.extents = True, []
            stripes = self.ledger.give_back(lease.name)
            del self.leases[lease.name]
            self.slots.restore(stripes)

    # ------------------------------------------------------------------ the KV cache takes back
    def reclaim(self, slots: int) -> int:
        """Free at least this many lent slots now: the allocator needs them before it answers.

        Returns the slots given back: fewer only when no more were lent, or when training kept them
        against the rules (logged as an error).
        """
        wanted = min(slots, self.lent_slots)
        freed = self._take_back(wanted, self.relieve)
        if freed < wanted:
            logger.error(
                "harli: the KV cache needs %d slots of training and got %d; still lent: %s",
                wanted,
                freed,
                self.bytes_by_purpose(),
            )
        return freed

    def give_ahead(self, stripes: int, give: Relieve) -> int:
        """As ``reclaim``, for stripes needed in a moment: ``give`` uses no last resorts."""
        return self._take_back(min(stripes, self.train_stripes) * self.geometry.stripe_slots, give)

    def _take_back(self, slots: int, give: Relieve) -> int:
        """Have training give back; count and time it. Returns: slots."""
        if slots <= 0:
            return 0
        began, lent = time.perf_counter(), self.lent_slots
        give(-(-slots // self.geometry.stripe_slots))
        freed = lent - self.lent_slots
        if freed:
            self.quota.reclaimed(self._clock())
            self.reclaims += 1
            self.reclaim_seconds.append(time.perf_counter() - began)
        return freed

    def must_give(self) -> int:
        """Stripes to give back now, ahead of need; if there are any, the cool-down starts."""
        train = self.train_stripes
        if train == 0:
            return 0
        free = self.free_slots // self.geometry.stripe_slots
        stripes = self.quota.must_give(free_stripes=free, train_stripes=train)
        if stripes:
            self.quota.reclaimed(self._clock())
        return stripes

    def tick(self, used_slots: int, *, idle: bool = False) -> None:
        """Once per scheduler turn while a run is held.

        While training holds memory, cached prefixes above the kept share are evicted when free
        slots get few, so that new prompts do not take training's memory for prefixes that may never
        be used. It begins half-way between the watermarks, to fall on few turns, and refills to the
        high one.

        ``idle``: nothing is served: the books are compared too (``check``; LedgerError).
        """
        now_s = self._clock()
        self.quota.observe(now_s=now_s, used_slots=used_slots)
        if self.train_stripes:
            marks, free = self.quota.watermarks, self.free_slots // self.geometry.stripe_slots
            if 2 * free < marks.low + marks.high:
                self._evict_prefixes(now_s, marks.high - free)
        if idle:
            self.check()

    def check(self) -> None:
        """Compare the lent stripes of the ledger, the leases, the slot allocator and the backing.

        Raises:
            LedgerError: two of them differ; names both and the stripes.
        """
        self.ledger.check()
        for name, lease in self.leases.items():
            held = self.ledger.stripes_of(name)
            if lease.name != name or lease.revoked or lease.stripes != held:
                raise LedgerError(f"lease {name!r} is of stripes {lease.stripes}, in the ledger of {held}")
        books = {
            "the leases": {stripe for lease in self.leases.values() for stripe in lease.stripes},
            "the backing": set(self.backing.lent),
            "the slot allocator": set(self.slots.lent_stripes),
        }
        lent = set(self.ledger.lent())
        for name, stripes in books.items():
            if stripes != lent:
                raise LedgerError(
                    f"the ledger and {name} differ on whether stripes {sorted(stripes ^ lent)} are lent"
                )

    # ------------------------------------------------------------------ for people and metrics
    def bytes_by_purpose(self) -> dict[str, int]:
        """Bytes that training holds, by purpose."""
        held = dict.fromkeys((purpose.value for purpose in MemoryPurpose), 0)
        for lease in self.leases.values():
            held[lease.purpose.value] += len(lease.stripes) * self.geometry.stripe_bytes
        return held

    def status(self) -> dict[str, Any]:
        """The pool in figures: kv (with cached prefixes and the padded page), train and free bytes
        sum to ``total_bytes``; so does ``by_owner``, where ``kv`` has the free ones too."""
        geometry, marks = self.geometry, self.quota.watermarks
        total, train = geometry.total_bytes, self.train_stripes * geometry.stripe_bytes
        free = self.free_slots * geometry.row_bytes * geometry.buffers
        taken = sorted(self.reclaim_seconds)
        last_s = self.reclaim_seconds[-1] if taken else 0.0
        p50_s, max_s = (taken[len(taken) // 2], taken[-1]) if taken else (0.0, 0.0)
        return {
            "total_bytes": total,
            "kv_bytes": total - train - free,
            "train_bytes": train,
            "free_bytes": free,
            "by_owner": {"kv": total - train, **self.bytes_by_purpose()},
            "watermarks": {
                "low": marks.low * geometry.stripe_bytes,
                "high": marks.high * geometry.stripe_bytes,
            },
            "reclaims": self.reclaims,
            "reclaim_ms": {
                name: round(1e3 * value_s, 3)
                for name, value_s in (("p50", p50_s), ("max", max_s), ("last", last_s))
            },
            "moves": {"to_train": self.ledger.moves_to_train, "to_kv": self.ledger.moves_to_kv},
            "max_train_bytes": self.quota.max_train_bytes,
            "lendable_bytes": geometry.lendable_bytes,
            "backing": self.backing.name,
            "stripe_bytes": geometry.stripe_bytes,
        }

"""Training's memory in the scheduler: its source, and what goes when the KV cache needs it
(docs/internals/memory.md).

The KV cache comes first. Training gives back in this order, until it is enough:

    unused leases ── kept activations ── the micro-batch in flight ── the state, to host memory ── the run itself
                     (recomputed)        (run again later)            (the last resorts, for requests alone)

The pool asks inline when an allocation is short (``relieve``). Ahead of need only what can be
computed again is given: the first three when little is free (``tick``), the first two when prompts
wait, since how many of their tokens are cached is not known yet (``make_room``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_harli.config import show_size
from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.quota import UNUSED_S
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from sglang_harli.train_memory import TrainMemory

if TYPE_CHECKING:
    from sglang_harli.mem_cache.unified_pool import Evict, UnifiedPool

logger = logging.getLogger(__name__)


class Tenant(Protocol):
    """The part of a training run that gives back; each method says whether anything was."""

    needs_memory: tuple[MemoryPurpose, int] | None

    def drop_unused(self) -> bool: ...
    def drop_kept(self, enough: Callable[[], bool]) -> bool: ...
    def drop_micro_batch(self) -> bool: ...
    def spill(self) -> bool: ...


Enough = Callable[[], bool]
Step = Callable[[Tenant, Enough], object]
_SPARE: tuple[Step, ...] = (
    lambda tenant, enough: tenant.drop_unused(),
    lambda tenant, enough: tenant.drop_kept(enough),
)


class MemoryPressure:
    """Between the pool and the run that is held; lives on the scheduler's thread.

    Args:
        pool: None: the KV pool is SGLang's own, and training has ``fixed_bytes`` beside it.
        evict, edit_under: see ``UnifiedPool.lend_to``; reserved: see ``UnifiedPool``.
        reserve_bytes: what was left outside the pool for training, for ``status``.

    Attributes:
        memory: where training's leases come from.
        dropped_micro_batches: in flight, to be run again.
        spills: moves of the state to host memory; dropped_runs: went back to their checkpoints.
    """

    def __init__(
        self,
        pool: UnifiedPool | None,
        device: torch.device,
        *,
        evict: Evict | None = None,
        reserved: Callable[[], int] | None = None,
        edit_under: Callable[[], AbstractContextManager[Any]] = nullcontext,
        fixed_bytes: int = 0,
        reserve_bytes: int = 0,
    ) -> None:
        self.pool = pool
        self.fixed_bytes, self.reserve_bytes = fixed_bytes, reserve_bytes
        self.memory: TrainMemory = HeapMemory(device, fixed_bytes) if pool is None else TrainArena(pool)
        self.dropped_micro_batches = self.spills = self.dropped_runs = 0
        self._tenant: Tenant | None = None
        self._needs_bytes = 0
        self._drop_run: Callable[[str], None] | None = None
        if pool is not None:
            pool.lend_to(self.relieve, evict, edit_under)
            if reserved is not None:
                pool.reserved = reserved

    # ---------------------------------------------------------------- the run that is held
    def attach(self, tenant: Tenant, needs_bytes: int, drop_run: Callable[[str], None]) -> None:
        """A run is held.

        Args:
            needs_bytes: upper estimate of what it needs; 0: not known.
            drop_run: ends it with a reason, before ``detach``; its job goes on from the checkpoint.
        """
        self._tenant, self._needs_bytes, self._drop_run = tenant, needs_bytes, drop_run

    def detach(self) -> None:
        """The run is over.  A lease never outlives its run."""
        self._tenant, self._needs_bytes, self._drop_run = None, 0, None
        for lease in [] if self.pool is None else list(self.pool.leases.values()):
            logger.error("harli: lease %s of a run that is over was not given back", lease.name)
            lease.give_back()

    # ---------------------------------------------------------------- pressure
    def relieve(self, stripes: int) -> None:
        """Free at least ``stripes`` now: an allocation waits for it, so it must not fail."""
        self._give(stripes, (*_SPARE, self._micro_batch, self._spill, self._run))

    def _give(self, stripes: int, steps: Sequence[Step]) -> None:
        """One step after the other, until ``stripes`` are free."""
        pool, tenant = self.pool, self._tenant
        if pool is None or tenant is None:
            return
        goal = pool.train_stripes - stripes

        def enough() -> bool:
            return pool.train_stripes <= goal

        for step in steps:
            if enough():
                return
            step(tenant, enough)

    def _micro_batch(self, tenant: Tenant, _enough: Enough) -> None:
        self.dropped_micro_batches += tenant.drop_micro_batch()

    def _spill(self, tenant: Tenant, _enough: Enough) -> None:
        if tenant.spill():
            self.spills += 1
            logger.warning("harli: requests need all memory: the adapter's state has gone to host memory")

    def _run(self, _tenant: Tenant, _enough: Enough) -> None:
        assert self._drop_run is not None
        self.dropped_runs += 1
        logger.error("harli: requests need the memory of the run in training: it goes on from its checkpoint")
        self._drop_run("memory_pressure: requests needed the memory that the run held")

    # ---------------------------------------------------------------- ahead of need
    def tick(self, *, idle: bool = False) -> None:
        """Each scheduler turn while a run is held; ``idle``: nothing is served, check the books.

        Raises:
            LedgerError: they do not agree.
        """
        pool = self.pool
        if pool is None:
            return
        pool.tick(pool.used_slots, idle=idle)
        if stripes := pool.must_give():
            self._give(stripes, (*_SPARE, self._micro_batch))
        elif (above := pool.train_stripes - pool.quota.max_stripes) > 0:
            self._give(above, _SPARE)  # a cap was lowered: the micro-batch in flight is left to end

    def make_room(self, slots: int) -> None:
        """Prompts that wait may take up to ``slots`` in the next turn."""
        pool = self.pool
        if pool is not None and (short := slots - pool.free_slots) > 0:
            pool.give_ahead(-(-short // pool.geometry.stripe_slots), lambda n: self._give(n, _SPARE))

    @property
    def lends(self) -> bool:
        """Whether training holds memory of the pool now."""
        return self.pool is not None and self.pool.train_stripes > 0

    # ---------------------------------------------------------------- why a run waits
    def waiting(self) -> str | None:
        """Why the run waits for memory, with the bytes and who has them; None: it does not."""
        needs = self._tenant.needs_memory if self._tenant is not None else None
        if needs is None:
            return None
        purpose, nbytes = needs
        text = f"{show_size(nbytes)} for {purpose.text} is not available now: "
        figures, pool = self.status(), self.pool
        total, held = show_size(figures["total_bytes"]), show_size(figures["train_bytes"])
        if pool is None:
            return text + f"training has {held} of {total}"
        holders = "requests" if pool.evict is None else "requests and cached prefixes"
        text += f"of {total} {holders} hold {show_size(figures['kv_bytes'])}, training {held}"
        stripes, unit = pool.geometry.stripes_for(nbytes), pool.geometry.stripe_slots
        spare = pool.geometry.slots - pool.quota.kept_prefix_slots()
        if pool.scattered:
            text += "; enough is free, but in pieces that are too small: cached prefixes between them make way once "
            text += f"no request has used them for {UNUSED_S:.0f} s, or when requests end"
        elif pool.free_slots >= stripes * unit:
            text += "; what is free is kept for requests for a while, as their use has just changed"
        elif pool.evict is None:
            text += "; no prefixes are cached here that could make way: it comes as requests end"
            if reserved := pool.reserved():
                nbytes = reserved * pool.geometry.row_bytes * pool.geometry.buffers
                text += f", {show_size(nbytes)} of it kept by SGLang for what they are to decode"
        elif (pool.train_stripes + stripes + (high := pool.quota.watermarks.high)) * unit > spare:
            growth = (
                f" and {show_size(high * pool.geometry.stripe_bytes)} stay free for growth" if high else ""
            )
            text += (
                f"; prefixes may keep {pool.quota.prefix_keep:.0%} of it until no request has used them for "
                f"{UNUSED_S:.0f} s{growth}: lower --harli-prefix-keep or batch_size, flush the cache, or give the KV "
                "cache more memory"
            )
        elif pool.nothing_to_evict:
            text += "; no cached prefix can make way for it now: flush the cache, or wait until requests end"
        return text

    # ---------------------------------------------------------------- the cap
    def limit_conflict(self, max_train_bytes: int | None) -> str | None:
        """Why a cap on what is lent cannot be in force (None: it can)."""
        pool = self.pool
        if pool is None:
            return "max-train-mem: the KV pool of this server cannot lend, and training's own memory is fixed at start"
        if max_train_bytes is None:
            return None
        unit, lendable = pool.geometry.stripe_bytes, pool.geometry.lendable_bytes
        if max_train_bytes > lendable:
            return (
                f"max-train-mem: {show_size(max_train_bytes)} is above what the pool can lend, "
                f"{show_size(lendable)} ({lendable} bytes): give at most that, or none"
            )
        whole = max_train_bytes // unit * unit
        if not whole:
            return f"max-train-mem: the pool lends whole stripes of {show_size(unit)} ({unit} bytes): give at least one"
        if whole < self._needs_bytes:
            return (
                f"max-train-mem: the job in training needs up to {show_size(self._needs_bytes)} "
                f"({self._needs_bytes} bytes): give at least that, or pause it first"
            )
        return None

    def limit(self, max_train_bytes: int | None) -> str | None:
        """Put a cap in force; why it is not reached yet (None: it is)."""
        pool = self.pool
        assert pool is not None
        pool.quota.max_train_bytes = max_train_bytes
        if pool.train_stripes <= pool.quota.max_stripes:
            return None
        held = pool.train_stripes * pool.geometry.stripe_bytes
        return f"training holds {show_size(held)} and gives back what is above at the end of the micro-batch"

    @property
    def ever_bytes(self) -> int:
        """What training can have when the KV cache uses nothing."""
        if self.pool is None:
            return self.fixed_bytes
        return self.pool.quota.max_stripes * self.pool.geometry.stripe_bytes

    @property
    def space_bytes(self) -> int:
        """A space takes whole multiples of this."""
        return 1 if self.pool is None else self.pool.geometry.stripe_bytes

    # ---------------------------------------------------------------- harli status, metrics
    def status(self) -> dict[str, Any]:
        """Bytes by owner (kv, train and free sum to ``total_bytes``) and what pressure has cost."""
        figures = self._fixed() if self.pool is None else self.pool.status()
        return figures | {
            "reserve_bytes": self.reserve_bytes,
            "dropped_micro_batches": self.dropped_micro_batches,
            "spills": self.spills,
            "dropped_runs": self.dropped_runs,
        }

    def _fixed(self) -> dict[str, Any]:
        assert isinstance(self.memory, HeapMemory)
        used = self.memory.used
        return {
            "total_bytes": self.fixed_bytes,
            "kv_bytes": 0,
            "train_bytes": used,
            "free_bytes": self.fixed_bytes - used,
            "by_owner": {"train": used, "free": self.fixed_bytes - used},
            "watermarks": {"low": 0, "high": 0},
            "reclaims": 0,
            "reclaim_ms": {"p50": 0.0, "max": 0.0, "last": 0.0},
            "moves": {"to_train": 0, "to_kv": 0},
            "max_train_bytes": self.fixed_bytes,
            "lendable_bytes": 0,
            "backing": "fixed",
            "stripe_bytes": 0,
        }

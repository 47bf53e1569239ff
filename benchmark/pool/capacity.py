"""The largest micro-batch that fits, by trying: unsplit, with no quantum bound and nothing served.

The memories that are compared:

    whole        a budget of the pool's bytes, on the heap: what the whole budget allows
    least        of that what can be lent, less one stripe for each lease: what rounding to stripes may cost
    static ...   the training share of a static split, on the heap
    unified      the unified pool itself, on the host backing
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pool.judge import SPLITS, UNIFIED
from sglang_harli.core import QuantumKind
from sglang_harli.errors import ConfigError
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.train_memory import TrainMemory

SAVED_LEASES = 2  # the state, and the micro-batch; kept activations add one for each layer


class IdleSlots:
    """The slots of a KV cache that holds nothing (see ``unified_pool.SlotSource``)."""

    def __init__(self, geometry: PoolGeometry) -> None:
        self.size = geometry.slots - geometry.page_size
        self._lendable = set(geometry.lendable)
        self._free = set(self._lendable)

    @property
    def lent_stripes(self) -> set[int]:
        return self._lendable - self._free

    def available_size(self) -> int:
        return self.size  # lent slots count as available

    def free_stripes(self) -> list[int]:
        return sorted(self._free, reverse=True)

    def withdraw(self, stripes: Any) -> None:
        self._free -= set(stripes)

    def restore(self, stripes: Any) -> None:
        self._free |= set(stripes)


@dataclass(frozen=True, slots=True)
class Rows:
    """What is trained: rows of ``saved_tokens`` or ``kept_tokens`` tokens, with these
    hyperparameters."""

    saved_tokens: int
    kept_tokens: int
    hyperparameters: dict[str, Any]
    logits_bytes: int


class Capacity:
    """Tries micro-batches on one frozen base."""

    def __init__(self, model: Path, rows: Rows) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa")
        self._base = from_transformers(loaded)
        self._rows = rows
        config: Any = loaded.config
        self.layers = int(config.num_hidden_layers)
        self.row_bytes = int(config.num_key_value_heads) * int(config.head_dim) * loaded.dtype.itemsize
        self._vocab = int(config.vocab_size)

    def geometry(self, pool_tokens: int) -> PoolGeometry:
        """That of a server's KV pool of ``pool_tokens`` slots of this model, page size 1."""
        return PoolGeometry.plan(
            slots=pool_tokens + 1,
            row_bytes=self.row_bytes,
            buffers=2 * self.layers,
            page_size=1,
            granularity=mmap.PAGESIZE,
        )

    def largest(self, memory: TrainMemory, *, kept: bool) -> int:
        """Rows of the largest micro-batch that one optimizer step can be taken with; 0: none
        fits."""
        low, high = 0, 1
        while self._fits(memory, high, kept):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(memory, middle, kept) else (low, middle)
        return low

    def _fits(self, memory: TrainMemory, rows: int, kept: bool) -> bool:
        """Whether a step is applied (with ``kept``: every layer's activations kept).  Without
        ``kept`` the step ends where its memory is held, as the size of the largest one is proven by
        ``prove``."""
        try:
            done = self._step(memory, rows, kept=kept, whole=kept)
        except ConfigError:  # the pool can never hold it
            return False
        return QuantumKind.BACKWARD not in done if kept and done else bool(done)

    def prove(self, memory: TrainMemory, rows: int) -> None:
        """Take one whole optimizer step with a micro-batch of ``rows``.

        Raises:
            RuntimeError: it does not end.
        """
        if QuantumKind.OPTIMIZER not in self._step(memory, rows, kept=False, whole=True):
            raise RuntimeError(f"a step with a micro-batch of {rows} rows began and did not end")

    def _step(self, memory: TrainMemory, rows: int, *, kept: bool, whole: bool) -> set[QuantumKind]:
        """The kinds of quanta that ran; empty where the memory could not be had."""
        hp = Hyperparameters(batch_size=rows, **self._rows.hyperparameters)
        run = TrainingRun(
            self._base,
            RunSpec(job="capacity", attempt=1, hyperparameters=hp, total_steps=1),
            logits_bytes=self._rows.logits_bytes,
            memory=memory,
            keep_activations=kept,
        )
        try:
            self._feed(run, rows, self._rows.kept_tokens if kept else self._rows.saved_tokens)
            done: set[QuantumKind] = set()
            while (shape := run.peek()) is not None:
                done.add(run.run(shape.rows).kind)
                if not whole and QuantumKind.EMBED in done:
                    return done
            return done if run.finished else set()
        finally:
            run.release()

    def _feed(self, run: TrainingRun, rows: int, tokens: int) -> None:
        rng = np.random.default_rng(0)
        ids = rng.integers(10, self._vocab, rows * tokens, dtype=np.int32)
        batch = MicroBatch(
            job="capacity",
            attempt=1,
            cursor=BatchCursor(epoch=1, step=1, index=0),
            micro_batches=1,
            lengths=[tokens] * rows,
            rows=list(range(rows)),
            step_target_tokens=rows * (tokens - 1),
        )
        run.feed(*padded(batch, ids, ids))


def measure(model: Path, pool_tokens: int, rows: Rows) -> dict[str, Any]:
    """``capacity`` of the results, with the pool's cut."""
    torch.manual_seed(0)
    capacity = Capacity(model, rows)
    geometry = capacity.geometry(pool_tokens)
    backing = HostBacking(geometry)
    pool = UnifiedPool(geometry, backing, IdleSlots(geometry))
    found: dict[str, Any] = {
        "saved": {},
        "kept": {},
        "total_bytes": geometry.total_bytes,
        "lendable_bytes": geometry.lendable_bytes,
        "stripe_bytes": geometry.stripe_bytes,
    }
    cpu = torch.device("cpu")
    for name, leases in (("saved", SAVED_LEASES), ("kept", SAVED_LEASES + capacity.layers)):
        least = geometry.lendable_bytes - leases * geometry.stripe_bytes
        budgets = {"whole": geometry.total_bytes, "least": least}
        budgets |= {split: int((1 - share) * geometry.total_bytes) for split, share in SPLITS.items()}
        memories: dict[str, TrainMemory] = {n: HeapMemory(cpu, budget) for n, budget in budgets.items()}
        memories[UNIFIED] = TrainArena(pool)
        for mode, memory in memories.items():
            found[name][mode] = capacity.largest(memory, kept=name == "kept")
            print(f"largest micro-batch, {name}, {mode}: {found[name][mode]} rows", flush=True)
    capacity.prove(TrainArena(pool), found["saved"][UNIFIED])
    backing.close()
    return found

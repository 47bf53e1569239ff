"""Figures on the pool of memory."""

from __future__ import annotations

from typing import Any

from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure

POOL_METRICS: Table = {
    "harli_pool_bytes": (
        "gauge",
        "Memory of the pool by owner: kv (requests and cached prefixes), free, and training's by purpose.",
        ("owner",),
    ),
    "harli_pool_watermark_bytes": (
        "gauge",
        "Free memory that the KV cache keeps: below low training gives back, above high it may grow.",
        ("mark",),
    ),
    "harli_pool_reclaims_total": ("counter", "How often requests took memory back from training.", ()),
    "harli_pool_reclaim_seconds": ("histogram", "How long an allocation waited for memory to come back.", ()),
    "harli_dropped_micro_batches_total": (
        "counter",
        "Micro-batches in flight that were dropped for memory, to be run again.",
        (),
    ),
}


class PoolMetrics(Metrics):
    """The metrics of ``POOL_METRICS``; one for each scheduler."""

    TABLE = POOL_METRICS

    def __init__(self, pressure: MemoryPressure, *, registry: Any = None) -> None:
        super().__init__(registry=registry)
        self._pressure = pressure

    def _refresh(self) -> None:
        figures = self._pressure.status()
        training = {name: held for name, held in figures["by_owner"].items() if name != "kv"}
        owners = {"kv": figures["kv_bytes"], "free": figures["free_bytes"], **training}
        for owner, held in owners.items():
            self._set("harli_pool_bytes", held, owner)
        for mark, held in figures["watermarks"].items():
            self._set("harli_pool_watermark_bytes", held, mark)
        self._count("harli_dropped_micro_batches_total", figures["dropped_micro_batches"])
        new = int(self._count("harli_pool_reclaims_total", figures["reclaims"]))
        if new and self._pressure.pool is not None:  # the oldest of very many are not kept
            for seconds in list(self._pressure.pool.reclaim_seconds)[-new:]:
                self._made["harli_pool_reclaim_seconds"].observe(seconds)

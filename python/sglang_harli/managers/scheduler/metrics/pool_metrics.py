"""Scheduler process: figures on the pool of memory in SGLang's own ``/metrics`` (with ``--enable-metrics``).

As SGLang's scheduler does it: prometheus_client in its multiprocess mode, imported only after SGLang has set
PROMETHEUS_MULTIPROC_DIR; the route in the HTTP process collects what all processes have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it needs torch
    from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure

# Name: (kind, help, labels).
POOL_METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
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
RECLAIM_BUCKETS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.5)
EVERY_S = 1.0


def make(table: Mapping[str, tuple[str, str, tuple[str, ...]]], *, registry: Any = None) -> dict[str, Any]:
    """The metrics of a table, by name; after SGLang has set up its own."""
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    where = REGISTRY if registry is None else registry
    made: dict[str, Any] = {}
    for name, (kind, text, labels) in table.items():
        if kind == "counter":
            made[name] = Counter(name, text, labels, registry=where)
        elif kind == "histogram":
            made[name] = Histogram(name, text, labels, registry=where, buckets=RECLAIM_BUCKETS_S)
        else:
            made[name] = Gauge(name, text, labels, registry=where, multiprocess_mode="mostrecent")
    return made


class PoolMetrics:
    """The metrics of ``POOL_METRICS``; one for each scheduler.

    Args:
        pressure: whose figures they are.
        registry: prometheus_client's; None: the global one.
    """

    def __init__(self, pressure: MemoryPressure, *, registry: Any = None) -> None:
        self._pressure = pressure
        self._made = make(POOL_METRICS, registry=registry)
        self._reclaims = self._dropped = 0
        self._next_s = 0.0

    def update(self, now_s: float) -> None:
        """Called once a loop turn: looks at the pool once a second."""
        if now_s < self._next_s:
            return
        self._next_s = now_s + EVERY_S
        figures = self._pressure.status()
        training = {name: held for name, held in figures["by_owner"].items() if name != "kv"}
        owners = {"kv": figures["kv_bytes"], "free": figures["free_bytes"], **training}
        for owner, held in owners.items():
            self._made["harli_pool_bytes"].labels(owner=owner).set(held)
        for mark, held in figures["watermarks"].items():
            self._made["harli_pool_watermark_bytes"].labels(mark=mark).set(held)
        dropped = figures["dropped_micro_batches"]
        self._made["harli_dropped_micro_batches_total"].inc(dropped - self._dropped)
        self._dropped = dropped
        self._count_reclaims(figures["reclaims"])

    def _count_reclaims(self, reclaims: int) -> None:
        new, self._reclaims = reclaims - self._reclaims, reclaims
        if not new or self._pressure.pool is None:
            return
        self._made["harli_pool_reclaims_total"].inc(new)
        for seconds in list(self._pressure.pool.reclaim_seconds)[
            -new:
        ]:  # the oldest of very many are not kept
            self._made["harli_pool_reclaim_seconds"].observe(seconds)

"""Metrics in SGLang's own ``/metrics`` (with ``--enable-metrics``), from a table of names.

As in SGLang: prometheus_client's multiprocess mode, imported only after SGLang has set
PROMETHEUS_MULTIPROC_DIR; the HTTP process's route collects what all processes have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

Table = Mapping[str, tuple[str, str, tuple[str, ...]]]  # name: (kind, help, labels)

EVERY_S = 1.0
BUCKETS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.5)


def make(table: Table, *, registry: Any = None) -> dict[str, Any]:
    """The metrics of a table, by name; after SGLang has set up its own."""
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    where = REGISTRY if registry is None else registry
    made: dict[str, Any] = {}
    for name, (kind, text, labels) in table.items():
        if kind == "counter":
            made[name] = Counter(name, text, labels, registry=where)
        elif kind == "histogram":
            made[name] = Histogram(name, text, labels, registry=where, buckets=BUCKETS_S)
        else:
            made[name] = Gauge(name, text, labels, registry=where, multiprocess_mode="mostrecent")
    return made


class Metrics:
    """The metrics of one table, refreshed once a second; ``registry``: None is the global one."""

    TABLE: ClassVar[Table] = {}

    def __init__(self, *, registry: Any = None) -> None:
        self._made = make(self.TABLE, registry=registry)
        self._counted: dict[tuple[str, ...], float] = {}
        self._next_s = 0.0

    def update(self, now_s: float) -> None:
        """Called once a loop turn."""
        if now_s >= self._next_s:
            self._next_s = now_s + EVERY_S
            self._refresh()

    def _refresh(self) -> None:
        """Bring every metric up to date."""
        raise NotImplementedError

    def _of(self, name: str, labels: tuple[str, ...]) -> Any:
        return self._made[name].labels(*labels) if labels else self._made[name]

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._of(name, labels).set(value)

    def _count(self, name: str, total: float, *labels: str) -> float:
        """Bring a counter to a total; by how much it has grown."""
        new = max(total - self._counted.get((name, *labels), 0.0), 0.0)
        self._counted[(name, *labels)] = total
        self._of(name, labels).inc(new)
        return new

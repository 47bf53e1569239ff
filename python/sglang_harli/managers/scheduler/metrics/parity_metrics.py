"""Scheduler process: how far training is from serving, in SGLang's own ``/metrics`` (with ``--enable-metrics``).

As ``pool_metrics``: prometheus_client in its multiprocess mode, which SGLang's route in the HTTP process collects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_harli.managers.scheduler.metrics.pool_metrics import EVERY_S, make

if TYPE_CHECKING:  # it needs torch
    from sglang_harli.managers.scheduler.training.parity import Parity

# Name: (kind, help, labels).
PARITY_METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "harli_parity_difference": (
        "gauge",
        "Mean absolute difference of the log-probabilities of one prompt's tokens between serving and training; "
        "-1: not compared yet.",
        (),
    ),
    "harli_parity_accepted": (
        "gauge",
        "The largest such difference with which jobs run; -1: not known yet.",
        (),
    ),
    "harli_parity_ok": ("gauge", "Whether the difference is accepted.", ()),
}


class ParityMetrics:
    """The metrics of ``PARITY_METRICS``; one for each scheduler.

    Args:
        registry: prometheus_client's; None: the global one.
    """

    def __init__(self, parity: Parity | None, *, registry: Any = None) -> None:
        self._parity = parity
        self._made = make(PARITY_METRICS, registry=registry)
        self._next_s = 0.0
        self._set: tuple[float, float, bool] | None = None  # the values that the metrics have

    def update(self, now_s: float) -> None:
        """Called once a loop turn: looks once a second."""
        if now_s < self._next_s or self._parity is None:
            return
        self._next_s = now_s + EVERY_S
        known = self._parity.state in ("agrees", "differs")
        difference, accepted = (self._parity.difference, self._parity.accepted) if known else (-1.0, -1.0)
        values = (difference, accepted, self._parity.state == "agrees")
        if values != self._set:
            self._set = values
            for name, value in zip(PARITY_METRICS, values, strict=True):
                self._made[name].set(value)

"""Scheduler process: how good predictions are, in SGLang's own ``/metrics`` (with ``--enable-metrics``).

As ``pool_metrics``: prometheus_client in its multiprocess mode, which SGLang's route in the HTTP process collects.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.managers.scheduler.metrics.pool_metrics import EVERY_S, make
from sglang_harli.predictor.latency_predictor import LatencyPredictor

# Name: (kind, help, labels).  Phases: decode, prefill, each kind of quantum, first_ and corun_ with a kind.
PREDICTOR_METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "harli_predictor_mape_ratio": (
        "gauge",
        "Mean absolute error of predicted times over measured ones (0.1 is 10%), of the latest steps.",
        ("phase",),
    ),
    "harli_predictor_coverage_ratio": (
        "gauge",
        "Share of the latest steps that took no longer than their predicted upper bound.",
        ("phase",),
    ),
    "harli_predictor_upper_ratio": (
        "gauge",
        "Predicted upper bound over expectation, from the latest residuals.",
        ("phase",),
    ),
    "harli_predictor_steps_total": ("counter", "Steps and quanta whose time was predicted.", ("phase",)),
}


class PredictorMetrics:
    """The metrics of ``PREDICTOR_METRICS``; one for each scheduler.

    Args:
        predictor: whose figures they are.
        registry: prometheus_client's; None: the global one.
    """

    def __init__(self, predictor: LatencyPredictor, *, registry: Any = None) -> None:
        self._predictor = predictor
        self._made = make(PREDICTOR_METRICS, registry=registry)
        self._steps: dict[str, int] = {}
        self._next_s = 0.0

    def update(self, now_s: float) -> None:
        """Called once a loop turn: looks once a second."""
        if now_s < self._next_s:
            return
        self._next_s = now_s + EVERY_S
        for phase, (score, ratio) in self._predictor.scores().items():
            self._made["harli_predictor_mape_ratio"].labels(phase=phase).set(score.recent_mape)
            self._made["harli_predictor_coverage_ratio"].labels(phase=phase).set(score.recent_coverage)
            self._made["harli_predictor_upper_ratio"].labels(phase=phase).set(ratio)
            new = score.steps - self._steps.get(phase, 0)
            self._made["harli_predictor_steps_total"].labels(phase=phase).inc(new)
            self._steps[phase] = score.steps

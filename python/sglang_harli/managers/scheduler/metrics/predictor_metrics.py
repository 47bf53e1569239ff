"""Figures on how good predictions are."""

from __future__ import annotations

from typing import Any

from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.predictor.latency_predictor import LatencyPredictor

# Phases: decode, prefill, each kind of quantum, first_ and corun_ with a kind.
PREDICTOR_METRICS: Table = {
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


class PredictorMetrics(Metrics):
    """The metrics of ``PREDICTOR_METRICS``; one for each scheduler."""

    TABLE = PREDICTOR_METRICS

    def __init__(self, predictor: LatencyPredictor, *, registry: Any = None) -> None:
        super().__init__(registry=registry)
        self._predictor = predictor

    def _refresh(self) -> None:
        for phase, (score, ratio) in self._predictor.scores().items():
            self._set("harli_predictor_mape_ratio", score.recent_mape, phase)
            self._set("harli_predictor_coverage_ratio", score.recent_coverage, phase)
            self._set("harli_predictor_upper_ratio", ratio, phase)
            self._count("harli_predictor_steps_total", score.steps, phase)

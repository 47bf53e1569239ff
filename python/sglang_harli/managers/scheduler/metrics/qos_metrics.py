"""Scheduler process: what the policy does, in SGLang's own ``/metrics`` (with ``--enable-metrics``).

As ``pool_metrics``: prometheus_client in its multiprocess mode, which SGLang's route in the HTTP process collects.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_harli.managers.scheduler.metrics.pool_metrics import EVERY_S, make
from sglang_harli.managers.scheduler.policy.serving_state import ServingState

if TYPE_CHECKING:  # it needs torch
    from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer

# Name: (kind, help, labels).
QOS_METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "harli_slack_seconds": (
        "gauge",
        "What training could take before the next step at the latest decision; below 0: it yields. +Inf: no request "
        "was running.",
        (),
    ),
    "harli_quanta_total": (
        "counter",
        "Training quanta that ran, while requests were served and not; probe: the smallest, to be measured, although its "
        "estimate did not fit.",
        ("load",),
    ),
    "harli_quanta_per_step": ("gauge", "Training quanta per decode step, lately.", ()),
    "harli_yield_seconds_total": (
        "counter",
        "Time in which training had work and did not run, by reason, the decode steps within included.",
        ("reason",),
    ),
    "harli_slo_requests_total": (
        "counter",
        "Requests that finished while a job was held, and whether they met the TPOT target.",
        ("met",),
    ),
    "harli_slo_attainment_ratio": ("gauge", "Share of those requests that met it.", ()),
    "harli_impossible_target": (
        "gauge",
        "Whether a target is below what serving alone takes on this machine.",
        ("target",),
    ),
}


class QosMetrics:
    """The metrics of ``QOS_METRICS``; one for each scheduler.

    Args:
        registry: prometheus_client's; None: the global one.
    """

    def __init__(self, side: ServingState, trainer: CoTrainer, *, registry: Any = None) -> None:
        self._side, self._trainer = side, trainer
        self._made = make(QOS_METRICS, registry=registry)
        self._told: dict[tuple[str, str], float] = {}
        self._at = (0, 0)  # decode steps, quanta beside them
        self._next_s = 0.0

    def update(self, now_s: float) -> None:
        """Called once a loop turn: looks once a second."""
        if now_s < self._next_s:
            return
        self._next_s = now_s + EVERY_S
        side, trainer = self._side, self._trainer
        if side.last_slack is not None:
            self._made["harli_slack_seconds"].set(side.last_slack.seconds)
        busy, probes = trainer.busy_quanta, trainer.slotting.probes
        loads = {"busy": busy - probes, "probe": probes, "idle": trainer.quanta - busy}
        self._count("harli_quanta_total", "load", loads)
        steps, quanta = side.decode_steps - self._at[0], busy - self._at[1]
        if steps:
            self._made["harli_quanta_per_step"].set(quanta / steps)
            self._at = (side.decode_steps, busy)
        totals = trainer.slotting.yielded.totals(time.perf_counter())
        by_label: dict[str, float] = {}
        for reason, seconds in totals.items():
            by_label[reason.label] = by_label.get(reason.label, 0.0) + seconds
        self._count("harli_yield_seconds_total", "reason", by_label)
        met, finished = side.attainment.met, side.attainment.finished
        self._count("harli_slo_requests_total", "met", {"yes": met, "no": finished - met})
        if finished:
            self._made["harli_slo_attainment_ratio"].set(side.attainment.share)
        for name in ("tpot", "itl", "ttft"):
            self._made["harli_impossible_target"].labels(target=name).set(name in side.impossible)

    def _count(self, name: str, label: str, totals: Mapping[str, float]) -> None:
        for value, total in totals.items():
            new = total - self._told.get((name, value), 0.0)
            self._made[name].labels(**{label: value}).inc(max(new, 0.0))
            self._told[name, value] = total

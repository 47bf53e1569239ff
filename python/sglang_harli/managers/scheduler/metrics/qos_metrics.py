"""Figures on what the policy does."""

from __future__ import annotations

import time
from typing import Any

from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer

QOS_METRICS: Table = {
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


class QosMetrics(Metrics):
    """The metrics of ``QOS_METRICS``; one for each scheduler."""

    TABLE = QOS_METRICS

    def __init__(self, side: ServingState, trainer: CoTrainer, *, registry: Any = None) -> None:
        super().__init__(registry=registry)
        self._side, self._trainer = side, trainer
        self._at = (0, 0)  # decode steps, quanta beside them

    def _refresh(self) -> None:
        side, trainer = self._side, self._trainer
        if side.last_slack is not None:
            self._set("harli_slack_seconds", side.last_slack.seconds)
        busy, probes = trainer.busy_quanta, trainer.slotting.probes
        for load, total in (("busy", busy - probes), ("probe", probes), ("idle", trainer.quanta - busy)):
            self._count("harli_quanta_total", total, load)
        steps, quanta = side.decode_steps - self._at[0], busy - self._at[1]
        if steps:
            self._set("harli_quanta_per_step", quanta / steps)
            self._at = (side.decode_steps, busy)
        by_label: dict[str, float] = {}
        for reason, seconds in trainer.slotting.yielded.totals(time.perf_counter()).items():
            by_label[reason.label] = by_label.get(reason.label, 0.0) + seconds
        for label, seconds in by_label.items():
            self._count("harli_yield_seconds_total", seconds, label)
        met, finished = side.attainment.met, side.attainment.finished
        self._count("harli_slo_requests_total", met, "yes")
        self._count("harli_slo_requests_total", finished - met, "no")
        if finished:
            self._set("harli_slo_attainment_ratio", side.attainment.share)
        for name in ("tpot", "itl", "ttft"):
            self._set("harli_impossible_target", name in side.impossible, name)

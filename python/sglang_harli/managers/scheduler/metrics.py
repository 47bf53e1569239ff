"""What the scheduler shows in SGLang's ``/metrics``: memory, predictions, decisions, parity."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer
from sglang_harli.managers.scheduler.training.parity import Parity
from sglang_harli.predictor.latency_predictor import LatencyPredictor


class PoolMetrics(Metrics):
    """The pool of memory."""

    TABLE: ClassVar[Table] = {
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
        "harli_pool_reclaim_seconds": (
            "histogram",
            "How long an allocation waited for memory to come back.",
            (),
        ),
        "harli_dropped_micro_batches_total": (
            "counter",
            "Micro-batches in flight that were dropped for memory, to be run again.",
            (),
        ),
    }

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


class PredictorMetrics(Metrics):
    """How good predictions are."""

    # Phases: decode, prefill, each kind of quantum; launch_, first_ and corun_ with a kind.
    TABLE: ClassVar[Table] = {
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

    def __init__(self, predictor: LatencyPredictor, *, registry: Any = None) -> None:
        super().__init__(registry=registry)
        self._predictor = predictor

    def _refresh(self) -> None:
        for phase, (score, ratio) in self._predictor.scores().items():
            self._set("harli_predictor_mape_ratio", score.recent_mape, phase)
            self._set("harli_predictor_coverage_ratio", score.recent_coverage, phase)
            self._set("harli_predictor_upper_ratio", ratio, phase)
            self._count("harli_predictor_steps_total", score.steps, phase)


class QosMetrics(Metrics):
    """What the policy does."""

    TABLE: ClassVar[Table] = {
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
        "harli_requests_without_clock_total": (
            "counter",
            "Requests that ran although it was not known when they got their first token: training waits for them.",
            (),
        ),
        "harli_impossible_target": (
            "gauge",
            "Whether a target is below what serving alone takes on this machine.",
            ("target",),
        ),
    }

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
        self._count("harli_requests_without_clock_total", side.unclocked)
        for name in ("tpot", "itl", "ttft"):
            self._set("harli_impossible_target", name in side.impossible, name)


class ParityMetrics(Metrics):
    """How far training is from serving; None: there is no comparison."""

    TABLE: ClassVar[Table] = {
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

    def __init__(self, parity: Parity | None, *, registry: Any = None) -> None:
        super().__init__(registry=registry)
        self._parity = parity

    def _refresh(self) -> None:
        if self._parity is None:
            return
        known = self._parity.state in ("agrees", "differs")
        self._set("harli_parity_difference", self._parity.difference if known else -1.0)
        self._set("harli_parity_accepted", self._parity.accepted if known else -1.0)
        self._set("harli_parity_ok", self._parity.state == "agrees")

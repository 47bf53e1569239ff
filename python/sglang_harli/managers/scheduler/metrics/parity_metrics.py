"""Figures on how far training is from serving."""

from __future__ import annotations

from typing import Any

from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.managers.scheduler.training.parity import Parity

PARITY_METRICS: Table = {
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


class ParityMetrics(Metrics):
    """The metrics of ``PARITY_METRICS``; one for each scheduler. ``parity`` None: no comparison."""

    TABLE = PARITY_METRICS

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

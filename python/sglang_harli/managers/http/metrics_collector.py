"""Figures on the finetune service and its jobs."""

from __future__ import annotations

from sglang_harli.core import JobStatus
from sglang_harli.managers.http.supervision.supervisor import Supervisor
from sglang_harli.managers.prometheus import Metrics, Table
from sglang_harli.protocol.internal import ServiceState

METRICS: Table = {
    "harli_service_up": ("gauge", "Whether the finetune service runs.", ()),
    "harli_service_restarts_total": ("counter", "How often the finetune service was started again.", ()),
    "harli_finetune_degraded": (
        "gauge",
        "Whether the finetune service was given up: serving goes on without it until the server restarts.",
        (),
    ),
    "harli_jobs": ("gauge", "Finetune jobs of this run directory by status.", ("status",)),
}


class MetricsCollector(Metrics):
    """The metrics of ``METRICS``; one for each process, made after SGLang has set up its own."""

    TABLE = METRICS

    def refresh(self, keeper: Supervisor | None, state: ServiceState | None) -> None:
        """From what the supervisor knows and the service last said of itself."""
        if keeper is not None:
            self._set("harli_service_up", keeper.pid is not None)
            self._set("harli_finetune_degraded", keeper.gave_up is not None)
            self._count("harli_service_restarts_total", max(keeper.starts - 1, 0))
        if state is not None:
            for status in JobStatus:
                self._set("harli_jobs", state.jobs.get(str(status), 0), str(status))

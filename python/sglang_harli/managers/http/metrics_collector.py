"""HTTP process: figures on finetuning in SGLang's own ``/metrics`` (with ``--enable-metrics``).

As SGLang does it: prometheus_client in its multiprocess mode, imported only after SGLang has set
PROMETHEUS_MULTIPROC_DIR; SGLang's route collects what all its processes have written.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.managers.http.supervision.supervisor import Supervisor
from sglang_harli.managers.scheduler.metrics.pool_metrics import make
from sglang_harli.protocol.internal import ServiceState

# Name: (kind, help, labels).
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "harli_service_up": ("gauge", "Whether the finetune service runs.", ()),
    "harli_service_restarts_total": ("counter", "How often the finetune service was started again.", ()),
    "harli_finetune_degraded": (
        "gauge",
        "Whether the finetune service was given up: serving goes on without it until the server restarts.",
        (),
    ),
    "harli_jobs": ("gauge", "Finetune jobs of this run directory by status.", ("status",)),
}


class MetricsCollector:
    """The metrics of ``METRICS``; one for each process, made after SGLang has set up its own."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = make(METRICS)
        self._restarts = 0

    def update(self, keeper: Supervisor | None, state: ServiceState | None) -> None:
        """From what the supervisor knows and the service last said of itself."""
        if keeper is not None:
            self._made["harli_service_up"].set(keeper.pid is not None)
            self._made["harli_finetune_degraded"].set(keeper.gave_up is not None)
            restarts = max(keeper.starts - 1, 0)
            self._made["harli_service_restarts_total"].inc(restarts - self._restarts)
            self._restarts = restarts
        if state is not None:
            for status in JobStatus:
                self._made["harli_jobs"].labels(status=str(status)).set(state.jobs.get(str(status), 0))

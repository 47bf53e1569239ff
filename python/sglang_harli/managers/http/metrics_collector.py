"""Figures on the finetune service and its jobs."""

from __future__ import annotations

from sglang_harli.core import JobStatus
from sglang_harli.managers.http.prefill.prefill_servers import THERE, PrefillServers
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
    "harli_prefill_server_up": (
        "gauge",
        "Whether a prefill server of this decode server answered when it was asked last.",
        ("url",),
    ),
    "harli_prefill_adapters_missing": (
        "gauge",
        "Adapters that are served here and that a prefill server does not have: requests for them are refused.",
        ("url",),
    ),
    "harli_jobs": ("gauge", "Finetune jobs of this run directory by status.", ("status",)),
}


class MetricsCollector(Metrics):
    """The metrics of ``METRICS``; one for each process, made after SGLang has set up its own."""

    TABLE = METRICS

    def refresh(
        self, keeper: Supervisor | None, state: ServiceState | None, pair: PrefillServers | None = None
    ) -> None:
        """From what the supervisor knows, the service last said of itself, and the prefill servers
        of a decode server."""
        for server in () if pair is None else pair.status():
            self._set("harli_prefill_server_up", server["state"] == THERE, server["url"])
            self._set("harli_prefill_adapters_missing", len(server["missing"]), server["url"])
        if keeper is not None:
            self._set("harli_service_up", keeper.pid is not None)
            self._set("harli_finetune_degraded", keeper.gave_up is not None)
            self._count("harli_service_restarts_total", max(keeper.starts - 1, 0))
        if state is not None:
            for status in JobStatus:
                self._set("harli_jobs", state.jobs.get(str(status), 0), str(status))

"""Runtime half of ``patches/17-cpu-kv-indices``: a prefill server of a pair runs on the CPU engine.

Leans on: ``srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin._send_kv_chunk``, the
scheduler's ``device`` and a request's ``disagg_kv_sender.supports_host_tensor_indices``.
"""

from __future__ import annotations

from typing import Any


def _indices_as_numpy(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    if str(scheduler.device) == "cpu":
        req.disagg_kv_sender.supports_host_tensor_indices = False


HOOKS = (
    (
        "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin._send_kv_chunk",
        _indices_as_numpy,
        "before",
    ),
)

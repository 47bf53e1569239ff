"""SGLang's requests that write to the served weights, on 0.5.16: each is an update by itself.

Leans on SGLang: ``io_struct`` and ``SchedulerWeightUpdaterManager.is_fully_idle``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import io_struct

ANSWERS: dict[type[Any], type[Any]] = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}


def unfinished(weight_updater: Any) -> bool:
    """Whether an update in several requests has begun and not ended: there is none."""
    return False


def is_idle(updater: Any) -> bool:
    """Whether a call that frees memory or flushes the cache is taken: with no request at all."""
    return bool(updater.is_fully_idle())


def refused_release(updater: Any, tags: list[str]) -> str | None:
    """Why these kinds of memory are not released: no weights are another process's here."""
    return None


def is_released(error: Exception) -> bool:
    """Whether a release has failed only at its last line, the wait for an accelerator: no, torch
    2.11 has none to wait for on a host without any."""
    return False

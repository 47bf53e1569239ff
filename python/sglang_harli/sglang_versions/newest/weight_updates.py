"""SGLang's requests that write to the served weights, on 0.5.23.

Some come in a session: ``/begin_weight_update``, any number of them, ``/end_weight_update``.
Leans on SGLang: ``io_struct``, ``SchedulerWeightUpdaterManager`` (``_session``, ``is_fully_idle``,
``scheduler``, ``_assert_weight_cache_inactive``) and ``Scheduler._engine_paused``.
"""

from __future__ import annotations

import itertools
import traceback
from typing import Any

from sglang.srt.managers import io_struct

ANSWERS: dict[type[Any], type[Any]] = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
    io_struct.BeginWeightUpdateReqInput: io_struct.BeginWeightUpdateReqOutput,
    io_struct.EndWeightUpdateReqInput: io_struct.EndWeightUpdateReqOutput,
}


def unfinished(weight_updater: Any) -> bool:
    """Whether a session is open: until its end the weights are neither the old nor the new ones."""
    return weight_updater._session is not None


def is_idle(updater: Any) -> bool:
    """Whether a call that frees memory or flushes the cache is taken: paused, what waits without KV
    is none of its concern."""
    scheduler = updater.scheduler
    return bool(updater.is_fully_idle(ignore_waiting=scheduler is not None and scheduler._engine_paused))


def refused_release(updater: Any, tags: list[str]) -> str | None:
    """Why these kinds of memory are not released, where SGLang finds it only after it has begun:
    weights of ``--weight-cache-mode`` are another process's as well."""
    if "weights" not in tags:
        return None
    try:
        updater._assert_weight_cache_inactive("release_memory_occupation")
    except RuntimeError as error:
        return str(error)
    return None


def is_released(error: Exception) -> bool:
    """Whether a release has failed only at its last line, the wait for an accelerator: a torch
    built for CUDA has one to wait for there also on a host without any."""
    import torch

    called = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    waited = ("release_memory_occupation", "synchronize") in itertools.pairwise(called)
    return waited and isinstance(error, RuntimeError) and not torch.accelerator.is_available()

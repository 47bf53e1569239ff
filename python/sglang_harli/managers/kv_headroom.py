"""Leaves training's memory out of the KV pool on CUDA (SGLang sizes the pool to all that is free).

An AROUND hook on KVCacheConfigurator._profile_available_bytes (sglang/srt/mem_cache/kv_cache_configurator.py).
On the CPU engine the pool is capped by --max-total-tokens and nothing is subtracted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def leave_room(original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any) -> int:
    """Available bytes for the KV pool, less ``--harli-max-train-mem``."""
    available = original(configurator, *args, **kwargs)
    if configurator.device == "cpu":
        return available
    import torch

    options = configurator.server_args.harli_options()
    total = (
        torch.get_device_module(configurator.device).get_device_properties(configurator.gpu_id).total_memory
    )
    wanted = options.train_bytes(total, cpu=False)
    logger.info("harli: %.1f GiB of device memory are left to training", wanted / 2**30)
    return available - wanted

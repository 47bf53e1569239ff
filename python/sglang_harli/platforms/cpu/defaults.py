"""The defaults of a server on SGLang's CPU engine, each with the reason that is logged.

SGLang sizes its pools for a device that it has to itself: far too large for a host.  Leans on
SGLang's ``ModelConfig``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_harli.errors import UnsupportedError

GIB = 2**30
MAX_RUNNING_REQUESTS = 32
KV_POOL_BYTES = GIB
KV_POOL_SHARE = 0.10
# 32 requests of 4,096 tokens: a tiny model's 1 GiB would be millions of slots, each of which costs
# SGLang's bookkeeping memory and time at start-up.
KV_POOL_TOKENS = 131_072
KV_POOL_MIN_TOKENS = 2_048

NO_OVERLAP = "on a CPU the next batch computes at once, so that it would only wait behind training"
USE_THE_LAUNCHER = "to serve on SGLang's CPU engine start with `python -m sglang_harli.launch_server`, which brings the kernels"
TORCH_LORA = "the LoRA kernels of the other backends need a GPU"

KEEP_FLOAT32 = "the model's own; SGLang's auto would choose float16"

# (argument, value, reason): what does not depend on the model.
BEFORE_MODEL: tuple[tuple[str, Any, str], ...] = (
    ("attention_backend", "torch_native", "the backend that needs no kernels of AMX or CUDA"),
    ("max_running_requests", MAX_RUNNING_REQUESTS, "a CPU's decode is slower with every request"),
)

# The same of a decode server of a pair, where SGLang has the option (0.5.23).
DECODE_SERVER: tuple[tuple[str, Any, str], ...] = (
    (
        "disaggregation_decode_retraction_backup",
        "cpu_tensor",
        "SGLang's pool for the KV of retracted requests is pinned memory, which needs CUDA",
    ),
)


def require_kernels() -> None:
    """UnsupportedError unless this process can import ``sgl_kernel``: only our launcher can put the
    stand-in on the path in time."""
    try:
        importlib.import_module("sgl_kernel")
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"sgl_kernel cannot be imported without a CUDA driver: {USE_THE_LAUNCHER}"
        ) from error


def is_float32(model: Any) -> bool:
    """Whether a model's weights are saved in float32 (``model``: SGLang's ModelConfig)."""
    return str(getattr(model.hf_config, "dtype", None)).removeprefix("torch.") == "float32"


def kv_pool(server_args: Any, model_config: Callable[[], Any]) -> list[tuple[str, Any, str]]:
    """The size of the KV pool: (argument, value, reason) for those that the operator left open.
    ``server_args``: as in force; ``model_config``: gives SGLang's ModelConfig."""
    if server_args.mem_fraction_static is not None:
        return []  # the operator sizes the pool by it, or by --max-total-tokens as well
    chosen: list[tuple[str, Any, str]] = []
    if server_args.max_total_tokens is None:
        model = model_config()
        memory = host_memory_bytes()
        budget = min(int(memory * KV_POOL_SHARE), KV_POOL_BYTES)
        tokens = pool_tokens(budget, token_bytes(model), int(model.context_len))
        reason = f"KV pool at most 10% of {memory / GIB:.1f} GB memory, 1 GB and {KV_POOL_TOKENS} tokens"
        chosen.append(("max_total_tokens", tokens, reason))
    chosen.append(("mem_fraction_static", 0.88, "--max-total-tokens bounds the KV pool"))
    return chosen


def pool_tokens(budget_bytes: int, bytes_per_token: int, context_len: int) -> int:
    """How many tokens' KV the pool holds: within the budget, and no more than a CPU can use.  One
    request of the model's full length fits wherever the budget allows it."""
    affordable = budget_bytes // max(bytes_per_token, 1)
    useful = max(KV_POOL_TOKENS, context_len + 1)
    return max(min(affordable, useful), KV_POOL_MIN_TOKENS)


def token_bytes(model: Any) -> int:
    """Bytes of one token's keys and values in all layers (``model``: SGLang's ModelConfig)."""
    heads = model.get_num_kv_heads(1)
    width = model.head_dim + (getattr(model, "v_head_dim", None) or model.head_dim)
    return int(model.num_hidden_layers * heads * width * model.dtype.itemsize)


def host_memory_bytes() -> int:
    """Memory that this process may use: the host's, or less where a control group limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total

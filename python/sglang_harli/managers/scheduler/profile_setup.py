"""Start-up: the latency profile that was measured for this server, if there is one.

The file is read once, before serving begins; later only ``harli profile`` touches it. Leans on
SGLang's ServerArgs: the flags of ``_FLAGS``, ``cuda_graph_config.decode.backend``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sglang_harli.predictor.profile import profile_table
from sglang_harli.predictor.profile.priors import Priors, from_table
from sglang_harli.predictor.profile.profile_table import ProfileKey
from sglang_harli.predictor.solo import Padding
from sglang_harli.protocol.job_limits import ServedLimits
from sglang_harli.sglang_versions import supported

logger = logging.getLogger(__name__)

# SGLang's flags by which a batch takes longer or shorter.
_FLAGS = (
    *("attention_backend", "decode_attention_backend", "prefill_attention_backend", "sampling_backend"),
    *("lora_backend", "kv_cache_dtype", "page_size", "enable_torch_compile", "tp_size"),
)


def profile_key(limits: ServedLimits, args: Any) -> ProfileKey:
    """What measured times depend on besides the load."""
    sizes = ",".join(f"{name}={i}x{o}" for name, (i, o) in sorted(limits.linear_sizes.items()))
    flags = [f"{name}={getattr(args, name)}" for name in _FLAGS if getattr(args, name, None) is not None]
    flags.append(f"decode_graphs={args.cuda_graph_config.decode.backend}")
    return ProfileKey(
        model=f"{limits.architecture} layers={limits.num_layers} vocab={limits.vocab_size} {sizes}",
        device=device_name(limits.device),
        dtype=limits.dtype,
        sglang=supported.installed(),
        flags=" ".join(flags),
    )


def device_name(device: str) -> str:
    """The name of the processor, as its vendor gives it; on a CPU with the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'cpu'}, {torch.get_num_threads()} threads"


def starting_priors(path: str, key: ProfileKey, guess: Priors, padding: Padding) -> Priors:
    """Lines through the profile's points; the guess where this server has no profile."""
    found = profile_table.load(path, key)
    logger.info("harli: %s", found.text)
    return guess if found.table is None else from_table(found.table, guess, padding)

"""Runtime half of ``patches/04-lora-peft-adapters``: PEFT's adapters of all seven linear layers.

Leans on: ``srt.lora.lora.LoRAAdapter._normalize_weights`` and
``srt.lora.lora_config.LoRAConfig.__init__``.
"""

from __future__ import annotations

import math
from typing import Any


def _after_config(result: None, config: Any, *args: Any, **kwargs: Any) -> None:
    if config.hf_config.get("use_rslora"):
        config.lora_alpha = config.lora_alpha * math.sqrt(config.r)


def _before_normalize(adapter: Any) -> None:
    fused = _fused_modules(adapter)
    for layer in adapter.layers:
        fill_missing(layer.weights, adapter.base_hf_config, fused)


def fill_missing(weights: dict[str, Any], base_config: Any, fused: frozenset[str]) -> None:
    """Add zeros, in place, for the parts of one layer's ``fused`` modules (``qkv_proj``,
    ``gate_up_proj``) that an adapter leaves out.  A is [r, inputs], B is [outputs, r]."""
    groups: list[dict[str, int | None]] = []
    if "qkv_proj" in fused:
        groups.append(_qkv_rows(base_config))
    if "gate_up_proj" in fused:
        groups.append({"gate_proj": None, "up_proj": None})
    for rows in groups:
        for name, weight in list(weights.items()):
            part = next((part for part in rows if f".{part}." in name), None)
            if part is None or weight.dim() != 2 or "experts" in name:
                continue
            for other, outputs in rows.items():
                missing = name.replace(f".{part}.", f".{other}.")
                if missing in weights:
                    continue
                if "lora_A" in name or outputs is None:
                    weights[missing] = weight.new_zeros(weight.shape)
                elif "lora_B" in name:
                    weights[missing] = weight.new_zeros(outputs, weight.shape[1])


def _qkv_rows(base_config: Any) -> dict[str, int | None]:
    heads = base_config.num_attention_heads
    kv_heads = getattr(base_config, "num_key_value_heads", None) or heads
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    return {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}


def _fused_modules(adapter: Any) -> frozenset[str]:
    found = adapter.__dict__.get("_fused_modules")
    if found is None:
        names = adapter.base_model.named_modules() if adapter.base_model is not None else ()
        leaves = {name.rpartition(".")[2] for name, _ in names}
        found = adapter.__dict__["_fused_modules"] = frozenset(leaves & {"qkv_proj", "gate_up_proj"})
    return found


HOOKS = (
    ("sglang.srt.lora.lora.LoRAAdapter._normalize_weights", _before_normalize, "before"),
    ("sglang.srt.lora.lora_config.LoRAConfig.__init__", _after_config, "after"),
)

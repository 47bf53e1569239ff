"""PEFT's adapter_config.json for a finished adapter, as a pure function (no torch, no peft).

It stands beside the saved adapter and goes with a publication; SGLang and
``PeftModel.from_pretrained`` both read it.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.protocol.public import Hyperparameters


def adapter_config(hyperparameters: Hyperparameters, base_model_path: str) -> dict[str, Any]:
    """The configuration of an adapter trained with ``hyperparameters``.

    SGLang scales by ``lora_alpha / r`` and does not know rank-stabilised LoRA (alpha / sqrt(r));
    PEFT knows both.  So rsLoRA is written as plain LoRA with the equivalent alpha, ``alpha *
    sqrt(r)``.  ``base_model_path``: folder or hub id of the base model; informative.
    """
    alpha = hyperparameters.scaling * hyperparameters.lora_r
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_path,
        "r": hyperparameters.lora_r,
        # PEFT annotates an int; the equivalent alpha of rsLoRA is seldom one
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": hyperparameters.lora_dropout,
        "target_modules": list(hyperparameters.target_modules),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }

"""All patches of SGLang: what each changes and the function that registers its runtime half.

Each has a page and an upstream-ready diff of the same name in the top-level folder ``patches/``.
The patch modules import SGLang when they are registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_harli.patches import (
    control_requests,
    cpu_sampling,
    idle_health_check,
    nan_sampling,
    request_fields,
    session_replace,
    shutdown_drain,
    stop_regex,
)
from sglang_harli.patches.lora import (
    adapter_checks,
    cache_key,
    gate,
    padded_mlp,
    peft_adapters,
    pin_memory,
    request_counts,
    unload,
)


@dataclass(frozen=True)
class Patch:
    """One change to SGLang's own code; its page and its diff have its ``name``.

    Attributes:
        targets: the SGLang files that it changes, relative to the ``sglang`` package.
        register: puts its hooks into a ``HookRegistry``; they take effect with ``apply_hooks``.
    """

    name: str
    targets: tuple[str, ...]
    register: Callable[[Any], None]


ALL: tuple[Patch, ...] = (
    Patch(
        "01-lora-pin-memory",
        ("srt/lora/layers.py", "srt/lora/backend/torch_backend.py", "srt/lora/utils.py"),
        pin_memory.register,
    ),
    Patch(
        "02-lora-gate",
        (
            "srt/lora/layers.py",
            "srt/lora/lora_manager.py",
            "srt/model_executor/runner/decode_cuda_graph_runner.py",
        ),
        gate.register,
    ),
    Patch("03-lora-padded-mlp", ("srt/lora/lora.py", "srt/lora/lora_manager.py"), padded_mlp.register),
    Patch("04-lora-peft-adapters", ("srt/lora/lora.py", "srt/lora/lora_config.py"), peft_adapters.register),
    Patch(
        "05-lora-adapter-checks",
        (
            "srt/lora/lora.py",
            "srt/lora/lora_config.py",
            "srt/lora/lora_manager.py",
            "srt/managers/tp_worker.py",
        ),
        adapter_checks.register,
    ),
    Patch(
        "06-request-fields",
        (
            "srt/managers/io_struct.py",
            "srt/managers/tokenizer_manager.py",
            "srt/managers/tokenizer_manager_score_mixin.py",
            "srt/sampling/sampling_params.py",
        ),
        request_fields.register,
    ),
    Patch(
        "07-lora-request-counts",
        ("srt/lora/lora_registry.py", "srt/managers/tokenizer_manager.py"),
        request_counts.register,
    ),
    Patch(
        "08-lora-unload",
        (
            "srt/lora/lora_registry.py",
            "srt/managers/tokenizer_control_mixin.py",
            "srt/managers/tokenizer_manager.py",
        ),
        unload.register,
    ),
    Patch("09-shutdown-drain", ("srt/managers/tokenizer_manager.py",), shutdown_drain.register),
    Patch("10-idle-health-check", ("srt/managers/scheduler.py",), idle_health_check.register),
    Patch("11-lora-cache-key", ("srt/managers/tokenizer_manager.py",), cache_key.register),
    Patch("12-nan-sampling", ("srt/layers/sampler.py",), nan_sampling.register),
    Patch(
        "13-cpu-sampling",
        (
            "srt/constrained/xgrammar_backend.py",
            "srt/layers/sampler.py",
            "srt/sampling/penaltylib/repetition_penalty.py",
        ),
        cpu_sampling.register,
    ),
    Patch("14-session-replace", ("srt/session/session_controller.py",), session_replace.register),
    Patch(
        "15-control-requests",
        (
            "srt/managers/io_struct.py",
            "srt/managers/scheduler_components/weight_updater.py",
            "srt/managers/tokenizer_control_mixin.py",
        ),
        control_requests.register,
    ),
    Patch("16-stop-regex", ("srt/managers/schedule_batch.py",), stop_regex.register),
)


def register_all(registry: Any) -> None:
    """Register every patch with SGLang's ``HookRegistry`` (the class, or one of its kind)."""
    for patch in ALL:
        patch.register(registry)

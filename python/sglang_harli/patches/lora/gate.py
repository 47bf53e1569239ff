"""Runtime half of ``patches/02-lora-gate``: LoRA costs nothing while no request uses an adapter.

Leans on: ``srt.lora.lora_manager.LoRAManager`` (``init_state``, ``prepare_lora_batch``,
``fetch_new_loras``; ``lora_modules``, ``memory_pool``), ``srt.lora.layers.BaseLayerWithLoRA``,
``srt.model_executor.runner_utils.capture_mode``, and on what ``lora_gate`` of each SGLang's own
files does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang_harli.sglang_versions.current import lora_gate

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"


# ------------------------------------------------------------------ the layers
def _after_init_state(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """A forward asks for the base layer up to eight times, and nn.Module looks for it last of
    all."""
    from sglang.srt.lora.layers import BaseLayerWithLoRA

    for _name, module in _wrappers(manager):
        if isinstance(module, BaseLayerWithLoRA):
            module.__dict__["base_layer"] = module.base_layer


def _wrappers(manager: Any) -> Iterator[tuple[str, Any]]:
    return (item for layer in manager.lora_modules for item in layer.items())


# ------------------------------------------------------------------ the batch
def _prepare_lora_batch(original: Callable[..., None], manager: Any, forward_batch: Any) -> None:
    if _is_idle(manager, forward_batch):
        lora_gate.pass_over(manager)
    else:
        original(manager, forward_batch)


def _is_idle(manager: Any, forward_batch: Any) -> bool:
    """Whether nothing that runs for this batch will read its LoRA information."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    lora_ids = forward_batch.lora_ids
    if lora_ids.count(None) != len(lora_ids) or get_is_capture_mode():
        return False
    return not lora_gate.graph_reads_batch(manager, forward_batch) and _only_dense(manager)


def _only_dense(manager: Any) -> bool:
    """Experts and MLA's kv_b_proj read the batch's information themselves, also without an
    adapter."""
    answer = manager.__dict__.get("_only_dense_wrappers")
    if answer is None:
        from sglang.srt.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA

        answer = manager._only_dense_wrappers = all(
            isinstance(module, BaseLayerWithLoRA)
            and not isinstance(module, FusedMoEWithLoRA)
            and not name.endswith("kv_b_proj")
            for name, module in _wrappers(manager)
        )
    return answer


def _fetch_new_loras(
    original: Callable[..., None], manager: Any, new_loras: set[str | None], *running: Any
) -> None:
    """``None`` stands for the base model; it owns a slot of the pool but has no recency to keep."""
    base_only = len(new_loras) == 1 and None in new_loras and not (running and running[0])
    if not (base_only and None in manager.memory_pool.uid_to_buffer_id):
        original(manager, new_loras, *running)


HOOKS = (
    *lora_gate.HOOKS,
    (f"{_MANAGER}.init_state", _after_init_state, "after"),
    (f"{_MANAGER}.prepare_lora_batch", _prepare_lora_batch, "around"),
    (f"{_MANAGER}.fetch_new_loras", _fetch_new_loras, "around"),
)

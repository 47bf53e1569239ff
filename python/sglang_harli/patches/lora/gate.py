"""Runtime half of ``patches/02-lora-gate``: LoRA costs nothing while no request uses an adapter.

Leans on: ``srt.lora.layers.BaseLayerWithLoRA.set_lora``, ``srt.lora.lora_manager.LoRAManager``
(``__init__``, ``prepare_lora_batch``, ``fetch_new_loras``), ``srt.lora.utils.LoRABatchInfo``,
``srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture`` and
``srt.model_executor.runner_utils.capture_mode``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"
_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


# ------------------------------------------------------------------ the layers
def _before_manager(manager: Any, *args: Any, **kwargs: Any) -> None:
    install()


def install() -> None:
    """Make ``set_lora`` of the wrappers follow the batch; repeating it changes nothing."""
    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from sglang.srt.model_executor.runner_utils import capture_mode

    if isinstance(BaseLayerWithLoRA.__dict__.get("set_lora"), property):
        return
    is_capturing, variant = capture_mode.get_is_capture_mode, capture_mode.get_capture_lora_variant

    def is_set(layer: Any) -> bool:
        values = layer.__dict__
        if not values.get("_has_lora_buffers", False):
            return False
        if values["lora_backend"].batch_info.has_active_lora:
            return True
        # A graph is captured with a batch of no adapter, and replayed for batches that have one.
        return is_capturing() and variant() != "nolora"

    def assign(layer: Any, value: bool) -> None:
        values = layer.__dict__
        values["_has_lora_buffers"] = value
        # A forward asks for it up to eight times, and nn.Module looks for a submodule last of all.
        values["base_layer"] = values["_modules"]["base_layer"]

    BaseLayerWithLoRA.set_lora = property(is_set, assign)  # type: ignore[assignment]


# ------------------------------------------------------------------ the batch
def _prepare_lora_batch(original: Callable[..., None], manager: Any, forward_batch: Any) -> None:
    if _is_idle(manager, forward_batch.lora_ids):
        manager.lora_backend.batch_info = _idle_batch_info()
    else:
        original(manager, forward_batch)


def _is_idle(manager: Any, lora_ids: list[str | None]) -> bool:
    """Whether nothing that runs for this batch will read its LoRA information."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    if lora_ids.count(None) != len(lora_ids) or get_is_capture_mode():
        return False
    if hasattr(manager, "max_bs_in_cuda_graph") and not getattr(manager, "has_nolora_graphs", False):
        return False  # the only graphs there are hold the LoRA kernels
    return _only_dense(manager)


def _only_dense(manager: Any) -> bool:
    """Experts read the batch's information themselves, whether or not it has an adapter."""
    answer = manager.__dict__.get("_only_dense_wrappers")
    if answer is None:
        from sglang.srt.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA

        wrappers = [module for layer in manager.lora_modules for module in layer.values()]
        answer = manager._only_dense_wrappers = all(
            isinstance(module, BaseLayerWithLoRA) and not isinstance(module, FusedMoEWithLoRA)
            for module in wrappers
        )
    return answer


@functools.cache
def _idle_batch_info() -> Any:
    from sglang.srt.lora.utils import LoRABatchInfo

    empty: dict[str, Any] = dict.fromkeys(
        ("seg_indptr", "weight_indices", "lora_ranks", "scalings", "max_len", "seg_lens", "permutation")
    )
    return LoRABatchInfo(use_cuda_graph=False, bs=0, num_segments=0, **empty)


def _fetch_new_loras(
    original: Callable[..., None], manager: Any, new_loras: set[str | None], *running: Any
) -> None:
    """``None`` stands for the base model; it owns a slot of the pool but has no recency to keep."""
    base_only = len(new_loras) == 1 and None in new_loras and not (running and running[0])
    if not (base_only and None in manager.memory_pool.uid_to_buffer_id):
        original(manager, new_loras, *running)


# ------------------------------------------------------------------ CUDA graphs
def _capture(original: Callable[..., None], runner: Any) -> None:
    from sglang.srt.model_executor.runner_utils import capture_mode

    if not runner.model_runner.server_args.enable_lora:
        original(runner)
        return
    runner.record_nolora_graph = True
    try:
        original(runner)
    finally:
        capture_mode._set_capture_lora_variant(None)  # of no concern to the next capture
    runner.model_runner.lora_manager.has_nolora_graphs = True


HOOKS = (
    (f"{_MANAGER}.__init__", _before_manager, "before"),
    (f"{_MANAGER}.prepare_lora_batch", _prepare_lora_batch, "around"),
    (f"{_MANAGER}.fetch_new_loras", _fetch_new_loras, "around"),
    (f"{_RUNNER}.capture", _capture, "around"),
)

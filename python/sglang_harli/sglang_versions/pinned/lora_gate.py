"""What skips LoRA for batches without an adapter, on SGLang 0.5.16, which has nothing for it.

Leans on: ``srt.lora.layers.BaseLayerWithLoRA.set_lora``, ``srt.lora.lora_manager.LoRAManager``
(``__init__``; ``lora_backend``, ``max_bs_in_cuda_graph``), ``srt.lora.utils.LoRABatchInfo``,
``srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner`` (``capture``;
``record_nolora_graph``) and ``srt.model_executor.runner_utils.capture_mode``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


# ------------------------------------------------------------------ the batch
def graph_reads_batch(manager: Any, forward_batch: Any) -> bool:
    """Whether this batch may replay a graph that holds LoRA kernels."""
    return hasattr(manager, "max_bs_in_cuda_graph") and not getattr(manager, "has_nolora_graphs", False)


def pass_over(manager: Any) -> None:
    """There is no LoRA in this batch: nothing reads what lies here."""
    manager.lora_backend.batch_info = _idle_batch_info()


@functools.cache
def _idle_batch_info() -> Any:
    from sglang.srt.lora.utils import LoRABatchInfo

    empty: dict[str, Any] = dict.fromkeys(
        ("seg_indptr", "weight_indices", "lora_ranks", "scalings", "max_len", "seg_lens", "permutation")
    )
    return LoRABatchInfo(use_cuda_graph=False, bs=0, num_segments=0, **empty)


# ------------------------------------------------------------------ the layers
def is_active(layer: Any) -> bool:
    """Whether a wrapper computes its delta now."""
    return bool(layer.set_lora)


def _before_manager(manager: Any, *args: Any, **kwargs: Any) -> None:
    _install()


def _install() -> None:
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
        layer.__dict__["_has_lora_buffers"] = value

    BaseLayerWithLoRA.set_lora = property(is_set, assign)  # type: ignore[assignment]


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
        capture_mode._set_capture_lora_variant(None)  # type: ignore[attr-defined]  # not of the next capture
    runner.model_runner.lora_manager.has_nolora_graphs = True


HOOKS = (
    ("sglang.srt.lora.lora_manager.LoRAManager.__init__", _before_manager, "before"),
    (f"{_RUNNER}.capture", _capture, "around"),
)

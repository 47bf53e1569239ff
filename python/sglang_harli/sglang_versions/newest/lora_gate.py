"""What skips LoRA for batches without an adapter, on SGLang 0.5.23: its own gate, which it opens
for one back end alone (``--lora-backend triton_v2``).

Its decode graphs then come in two variants, with LoRA kernels and without.  Leans on:
``srt.lora.lora_manager.LoRAManager`` (``__init__``, ``reset_lora_batch``,
``can_use_prefill_cuda_graph``; ``lora_backend``, ``attn_dp_enabled``),
``srt.lora.backend.base_backend.BaseLoRABackend`` (``skip_inactive_dense_lora``,
``skip_inactive_lora_batches``), which ``DecodeCudaGraphRunner.__init__`` reads, and
``srt.lora.layers.BaseLayerWithLoRA.lora_active``.
"""

from __future__ import annotations

from typing import Any


def graph_reads_batch(manager: Any, forward_batch: Any) -> bool:
    """Whether this batch may replay a graph that holds LoRA kernels."""
    # A prefill's graphs have no variant without.
    return not manager.lora_backend.skip_inactive_dense_lora or manager.can_use_prefill_cuda_graph(
        forward_batch
    )


def pass_over(manager: Any) -> None:
    """There is no LoRA in this batch: the wrappers run their base layers alone."""
    manager.reset_lora_batch()


def is_active(layer: Any) -> bool:
    """Whether a wrapper computes its delta now."""
    return bool(layer.lora_active)


def _after_manager(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    backend = manager.lora_backend
    # The ranks of DP attention join in collectives for each other's adapters; the back end that
    # skips whole batches is SGLang's own affair.
    if not manager.attn_dp_enabled and not backend.skip_inactive_lora_batches:
        backend.skip_inactive_dense_lora = True


HOOKS = (("sglang.srt.lora.lora_manager.LoRAManager.__init__", _after_manager, "after"),)

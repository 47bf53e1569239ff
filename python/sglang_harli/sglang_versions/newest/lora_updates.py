"""What loads and unloads of LoRA adapters give and take on SGLang 0.5.23, where each rank answers.

Leans on ``srt.managers.tokenizer_control_mixin`` (``_merge_lora_update_results``,
``_lora_load_needs_cleanup``, ``normalize_serialized_named_tensor_payloads``).
"""

from __future__ import annotations

from typing import Any


def prepare(request: Any) -> None:
    """A load's request as the scheduler takes it."""
    from sglang.srt.managers import io_struct, tokenizer_control_mixin

    if isinstance(request, io_struct.LoadLoRAAdapterFromTensorsReqInput):
        tensors: Any = request.serialized_named_tensors
        request.serialized_named_tensors = tokenizer_control_mixin.normalize_serialized_named_tensor_payloads(
            tensors
        )


def merged(results: list[Any]) -> Any:
    """One answer of all ranks: a success where all succeeded."""
    from sglang.srt.managers.tokenizer_control_mixin import _merge_lora_update_results

    return _merge_lora_update_results(results)


def is_partly_loaded(results: list[Any], name: str) -> bool:
    """Whether some rank has what a load, which failed, was to bring."""
    from sglang.srt.managers.tokenizer_control_mixin import _lora_load_needs_cleanup

    return _lora_load_needs_cleanup(results, name)

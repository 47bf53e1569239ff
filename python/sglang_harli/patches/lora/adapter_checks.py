"""Runtime half of ``patches/05-lora-adapter-checks``: a loaded adapter answers as PEFT would.

Leans on: ``srt.lora.lora_config.LoRAConfig`` (``__init__``, ``get_lora_config``),
``srt.lora.lora.LoRAAdapter`` (``initialize_weights``, ``initialize_weights_from_tensors``),
``srt.lora.lora_manager.LoRAManager`` (``validate_new_adapter``, ``init_state``,
``_load_lora_adapter``, ``_load_lora_adapter_from_tensors``, ``_unload_lora_adapter``),
``srt.managers.tp_worker.BaseTpWorker.load_lora_adapter_from_tensors``,
``srt.model_loader.loader.DefaultModelLoader`` and ``srt.managers.io_struct.LoRAUpdateOutput``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sglang_harli.patches.lora import peft_adapter
from sglang_harli.sglang_versions import supported

_CONFIG = "sglang.srt.lora.lora_config.LoRAConfig"
_ADAPTER = "sglang.srt.lora.lora.LoRAAdapter"
_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"


# ------------------------------------------------------------------ config
def _before_config(
    config: Any, path: str | None = None, config_dict: Any = None, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if path is None or config_dict is not None:
        config_dict = peft_adapter.checked_config(config_dict)
    return (config, path, config_dict, *args), kwargs


def _read_config(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        found = original(config, *args, **kwargs)
    except (OSError, ValueError) as error:
        where = "adapter_config.json in" if os.path.isdir(config.path) else "no folder of an adapter:"
        raise ValueError(f"{where} {config.path}: {error}") from error
    return peft_adapter.checked_config(found)


def _before_validate(manager: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    if hasattr(manager, "memory_pool"):  # at start what is served is not known yet: _after_init_state
        peft_adapter.check_limits(config.hf_config, manager.max_lora_rank, manager.target_modules)


def _after_init_state(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    for config in manager.configs.values():
        peft_adapter.check_limits(config.hf_config, manager.max_lora_rank, manager.target_modules)


# ------------------------------------------------------------------ weights
def _initialize_weights(original: Callable[..., None], adapter: Any) -> None:
    """SGLang's reading of an adapter's files, in one dict, so that they pass the one check."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    source = DefaultModelLoader.Source(adapter.config.path, revision=None, fall_back_to_pt=True)
    tensors: dict[str, Any] = {}
    for name, weight in DefaultModelLoader(adapter.load_config)._get_weights_iterator(source):
        if name in tensors:
            raise ValueError(f"{name} comes twice in the adapter's files")
        tensors[name] = weight
    adapter.initialize_weights_from_tensors(tensors)


def _before_tensors(adapter: Any, tensors: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weights = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    peft_adapter.check_weights(
        adapter.config.hf_config, weights, peft_adapter.model_of(adapter.base_hf_config)
    )
    plain = {peft_adapter.plain_name(name): tensor for name, tensor in tensors.items()}
    return (adapter, plain), {}


# ------------------------------------------------------------------ the manager
def _load(original: Callable[..., Any], manager: Any, lora_ref: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the loads: what has failed leaves nothing behind, and its error names the adapter."""
    result = original(manager, lora_ref, *args, **kwargs)
    if not result.success:
        if lora_ref.lora_id not in manager.lora_refs:
            manager.configs.pop(lora_ref.lora_id, None)
            manager.loras.pop(lora_ref.lora_id, None)
        if str(lora_ref.lora_name) not in (result.error_message or ""):
            result.error_message = (
                f"LoRA adapter {lora_ref.lora_name!r} cannot be served: {result.error_message}"
            )
    return result


def _unload(original: Callable[..., Any], manager: Any, lora_ref: Any) -> Any:
    """Unloading an adapter that is not loaded is no error (SGLang would end the scheduler)."""
    if lora_ref.lora_id not in manager.lora_refs:
        return manager.create_lora_update_result(success=True)
    return original(manager, lora_ref)


def _load_from_tensors(original: Callable[..., Any], worker: Any, request: Any) -> Any:
    """Around the scheduler's handler: failed deserialization is an error of this request alone."""
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    try:
        return original(worker, request)
    except Exception as error:  # boundary: a client's bytes that cannot be unpickled are an error reply
        text = f"LoRA adapter {request.lora_name!r} cannot be read: {type(error).__name__}: {error}"
        return LoRAUpdateOutput(success=False, error_message=text)


HOOKS = (
    (f"{_CONFIG}.__init__", _before_config, "before"),
    (f"{_CONFIG}.get_lora_config", _read_config, "around"),
    (f"{_ADAPTER}.initialize_weights", _initialize_weights, "around"),
    (f"{_ADAPTER}.initialize_weights_from_tensors", _before_tensors, "before"),
    (f"{_MANAGER}.validate_new_adapter", _before_validate, "before"),
    (f"{_MANAGER}.init_state", _after_init_state, "after"),
    (f"{_MANAGER}._load_lora_adapter", _load, "around"),
    (f"{_MANAGER}._load_lora_adapter_from_tensors", _load, "around"),
    *supported.only("pinned", ((f"{_MANAGER}._unload_lora_adapter", _unload, "around"),)),
    (
        "sglang.srt.managers.tp_worker.BaseTpWorker.load_lora_adapter_from_tensors",
        _load_from_tensors,
        "around",
    ),
)

"""Runtime half of ``patches/03-lora-padded-mlp``: an adapter that does not fit fails at its load.

Leans on: ``srt.lora.lora.LoRAAdapter._normalize_weights``, ``srt.lora.lora_manager.LoRAManager``
(``init_state``, ``load_lora_weights``, ``load_lora_weights_from_tensors``), ``srt.lora.utils`` and
the ``original_…`` values of ``srt.configs.update_config``.
"""

from __future__ import annotations

from typing import Any

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"


# ------------------------------------------------------------------ padding
def _after_normalize(result: None, adapter: Any) -> None:
    for layer in adapter.layers:
        pad_mlp(layer.weights, adapter.base_hf_config)


def pad_mlp(weights: dict[str, Any], base_config: Any) -> None:
    """Pad one layer's stacked MLP weights in place from the model's intermediate size to SGLang's.

    Args:
        weights: ``…gate_up_proj.lora_B.weight`` [2·own, r] becomes [2·served, r] (each half
            padded), ``…down_proj.lora_A.weight`` [r, own] becomes [r, served]; others stay.
        base_config: SGLang's, with ``original_intermediate_size`` where it was padded.
    """
    import torch

    served: int = getattr(base_config, "intermediate_size", 0)
    own: int = getattr(base_config, "original_intermediate_size", served)
    if own == served:
        return
    for name, weight in list(weights.items()):
        if weight.dim() != 2 or "experts" in name:
            continue
        if "gate_up_proj" in name and "lora_B" in name and weight.shape[0] == 2 * own:
            padded = weight.new_zeros(2, served, weight.shape[1])
            padded[:, :own] = weight.reshape(2, own, -1)
            weights[name] = padded.view(2 * served, -1)
        elif "down_proj" in name and "lora_A" in name and weight.shape[1] == own:
            weights[name] = torch.nn.functional.pad(weight, (0, served - own))


# ------------------------------------------------------------------ checking
def _after_load(result: None, manager: Any, lora_ref: Any, *args: Any, **kwargs: Any) -> None:
    if not hasattr(manager, "memory_pool"):
        return  # start-up: what is served is not known yet, init_state checks
    try:
        check_adapter(manager, lora_ref.lora_name, manager.loras[lora_ref.lora_id])
    except ValueError:
        manager.loras.pop(lora_ref.lora_id, None)
        manager.configs.pop(lora_ref.lora_id, None)
        raise


def _after_init_state(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    for lora_id, adapter in manager.loras.items():
        check_adapter(manager, manager.lora_refs[lora_id].lora_name, adapter)


def check_adapter(manager: Any, lora_name: str, adapter: Any) -> None:
    """ValueError for a weight of a normalized adapter that the memory pool cannot take: names the
    adapter, the weight and what the served model needs."""
    for layer_id, layer in enumerate(adapter.layers):
        for problem in layer_problems(manager, adapter.config.r, layer_id, layer.weights):
            raise ValueError(f"LoRA adapter {lora_name!r} cannot be served: {problem}")
    for name in adapter.embedding_layers:
        target = _target(name, manager.target_modules)
        if target is None and _is_lora(name):
            raise ValueError(f"LoRA adapter {lora_name!r} cannot be served: {_untargeted(manager, name)}")
        problem = _embedding_problem(manager, adapter, target, name)
        if problem:
            raise ValueError(f"LoRA adapter {lora_name!r} cannot be served: {problem}")


def layer_problems(manager: Any, rank: int, layer_id: int, weights: dict[str, Any]) -> list[str]:
    """What is wrong with the stacked weights of one layer, one sentence each."""
    from sglang.srt.lora.utils import get_hidden_dim, get_stacked_multiply

    problems = []
    for name, weight in weights.items():
        target = _target(name, manager.target_modules)
        if target is None or not _is_lora(name):
            problems.append(_untargeted(manager, name))
            continue
        if weight.dim() != 2 or "experts" in name:
            continue  # experts are laid out and checked by SGLang
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if other not in weights:
            problems.append(f"it has {name} but not {other}")
        sizes: Any = get_hidden_dim(target, manager.base_hf_config, manager.base_model, layer_id)
        inputs, outputs = sizes
        stacked = get_stacked_multiply(target, manager.base_model)
        needed = (rank * stacked, inputs) if "lora_A" in name else (outputs, rank)
        if tuple(weight.shape) != needed:
            problems.append(
                f"{name} has shape {tuple(weight.shape)}, but the served model at rank {rank} needs {needed}"
                f"{_padding_note(manager.base_hf_config)}: was the adapter trained on this model, with one rank "
                "for all modules?"
            )
    return problems


def _embedding_problem(manager: Any, adapter: Any, target: str | None, name: str) -> str:
    if target is None or not _is_lora(name):
        return ""
    config, rank = manager.base_hf_config, adapter.config.r
    vocabulary = config.vocab_size + adapter.config.lora_added_tokens_size
    inputs, outputs = (
        (vocabulary, config.hidden_size) if target == "embed_tokens" else (config.hidden_size, vocabulary)
    )
    needed = (
        (rank, inputs) if name.rsplit("lora_", 1)[-1].startswith(("A", "embedding_A")) else (outputs, rank)
    )
    shape = tuple(adapter.embedding_layers[name].shape)
    if shape == needed:
        return ""
    return f"{name} has shape {shape}, but the served model at rank {rank} needs {needed}"


def _padding_note(config: Any) -> str:
    own = getattr(config, "original_intermediate_size", None)
    return f" (its intermediate size of {own} is padded to {config.intermediate_size})" if own else ""


def _is_lora(name: str) -> bool:
    return any(mark in name for mark in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"))


def _target(name: str, target_modules: set[str]) -> str | None:
    """The longest served module in the name, as SGLang matches them."""
    return max((module for module in target_modules if module in name), key=len, default=None)


def _untargeted(manager: Any, name: str) -> str:
    served = ", ".join(sorted(manager.target_modules))
    return f"it has {name}, which is not a LoRA weight of the modules served here ({served})"


HOOKS = (
    ("sglang.srt.lora.lora.LoRAAdapter._normalize_weights", _after_normalize, "after"),
    (f"{_MANAGER}.load_lora_weights", _after_load, "after"),
    (f"{_MANAGER}.load_lora_weights_from_tensors", _after_load, "after"),
    (f"{_MANAGER}.init_state", _after_init_state, "after"),
)

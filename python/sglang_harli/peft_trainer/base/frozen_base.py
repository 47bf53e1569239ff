"""The served weights as a transformers module, without a copy (docs/internals/training-step.md).

A skeleton is built on the meta device from the config that SGLang serves with; each parameter is
then a view into the tensor that SGLang holds: q, k and v are row ranges of ``qkv_proj``, gate and
up of ``gate_up_proj``, and padded rows or columns are cut off. Rotary embeddings are SGLang's
table; what else its modules compute with is compared (``served_modules``).

Of SGLang this file knows parameter names, ``base_layer`` (its LoRA wrapper), ``quant_method`` and
``use_intel_amx_backend`` of its linear modules; nothing is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sglang_harli.architectures import BY_NAME, FUSED
from sglang_harli.peft_trainer.base import model_math, served_modules
from sglang_harli.peft_trainer.base.model_math import refuse
from sglang_harli.peft_trainer.layers.operators.choose import operators_for, with_kernels
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.peft_trainer.layers.rotary import Rotary, RotaryTable, ServedRotary, model_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


@dataclass(frozen=True)
class FrozenBase:
    """A causal LM whose parameters are frozen and, where bound, shared with the server.

    Attributes:
        model: transformers model in eval mode with sdpa attention; config: its own.
        dtype: of its weights and activations.
        math: what its config says of what it computes (``model_math.math_fields``).
        table: gives the rotary table of the first positions; positions: its end; None: without end.
        kernels: of ours, which are used on a device.
    """

    model: Any
    dtype: torch.dtype
    device: torch.device
    config: Any
    math: dict[str, Any]
    table: Callable[[int], RotaryTable]
    positions: int | None = None
    kernels: KernelSwitches = field(default_factory=KernelSwitches)

    @functools.cached_property
    def operators(self) -> Operators:
        """Those of its device."""
        return with_kernels(operators_for(self.device), self.dtype, self.kernels)

    def rotary(self) -> Rotary:
        """A rotary table for one run."""
        return Rotary(self.table, self.positions)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    def linears(self, layer: int) -> dict[str, tuple[str, nn.Linear]]:
        """(path in the layer, module) of each linear by its name such as ``q_proj``, in order."""
        return {
            path.rsplit(".", 1)[-1]: (path, module)
            for path, module in self.layers[layer].named_modules()
            if isinstance(module, nn.Linear)
        }

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each linear of one layer, by its own name such as ``q_proj``."""
        return {
            name: (linear.in_features, linear.out_features) for name, (_, linear) in self.linears(0).items()
        }

    def window(self, layer: int) -> int | None:
        """Tokens that a position of this layer attends to, itself included; None: all before it."""
        window = getattr(self.config, "sliding_window", None)
        if window is None or self.config.model_type == "llama":
            return None
        kinds = getattr(self.config, "layer_types", None)
        return window if kinds is None or kinds[layer] == "sliding_attention" else None


def from_transformers(model: nn.Module) -> FrozenBase:
    """A bare host: trains on a transformers model's own weights, without SGLang.

    Raises:
        UnsupportedError: an architecture or rotary embedding that is not supported.
    """
    config: Any = model.config
    model_math.check(config)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        raise refuse("rope_type dynamic: in transformers its frequencies change with the length of the input")
    model.requires_grad_(False)
    model.eval()
    config._attn_implementation = "sdpa"
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    table = model_table(model.model.rotary_emb, weight.dtype, weight.device)  # type: ignore[union-attr, arg-type]
    return FrozenBase(model, weight.dtype, weight.device, config, model_math.math_fields(config), table)


def bind(sglang_model: nn.Module, config: Any, kernels: KernelSwitches | None = None) -> FrozenBase:
    """The served model as a transformers module on views of the very same storages.

    Args:
        sglang_model: ``model_runner.model`` of SGLang, loaded; may be wrapped for LoRA serving.
        config: ``model_runner.model_config.hf_config``, as the operator and SGLang changed it.
        kernels: of ours, which are used on a device; None: none.

    Raises:
        UnsupportedError: naming the parameter that cannot be bound (packed, quantised, missing, of
            another shape), the architecture, or what the served model computes otherwise.
    """
    model_math.check(config)
    _check_dense(sglang_model)
    served = _served_parameters(sglang_model)
    embed = served.get("model.embed_tokens.weight")
    if embed is None:
        raise refuse("the served model has no parameter model.embed_tokens.weight")
    if embed.dtype not in DTYPES:
        raise refuse(f"model.embed_tokens.weight is {embed.dtype}; accepted: float32, bfloat16, float16")
    own = _skeleton_config(config)
    with torch.inference_mode(False):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, dtype=embed.dtype, attn_implementation="sdpa")
        rotary = ServedRotary(served_modules.check(sglang_model, model), embed.dtype)
        _fill(model, own, served, embed.dtype)
        model.model.rotary_emb = rotary
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise refuse(f"{name} of the training model has no counterpart in the served model")
    model.requires_grad_(False)
    model.eval()
    math = model_math.math_fields(config)
    return FrozenBase(
        *(model, embed.dtype, embed.device, own, math, rotary.table, len(rotary.cache)),
        kernels=KernelSwitches() if kernels is None else kernels,
    )


def _skeleton_config(served: Any) -> Any:
    """transformers' config of what is served, but for its rotary table and sliding windows."""
    fields = model_math.math_fields(served)
    architecture = fields.pop("architecture")
    del fields["rope"]
    kind = getattr(transformers, BY_NAME[architecture].config)
    return kind(architectures=[architecture], sliding_window=None, **fields)


def _check_dense(sglang_model: nn.Module) -> None:
    for name, module in sglang_model.named_modules():
        if getattr(module, "use_intel_amx_backend", False):
            raise refuse(f"{name}.weight is packed for AMX")
        method = getattr(module, "quant_method", None)
        if (
            method is not None
            and "weight" in module._parameters
            and type(method).__name__ not in _DENSE_METHODS
        ):
            raise refuse(f"{name}.weight is quantised or packed ({type(method).__name__})")


def _served_parameters(sglang_model: nn.Module) -> dict[str, Tensor]:
    """Parameters by the name they have without LoRA wrappers."""
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in sglang_model.named_parameters(remove_duplicate=False)
    }


def _fill(model: Any, config: Any, served: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give each parameter of the skeleton its view; every served parameter must find a place."""
    tied = bool(config.tie_word_embeddings)
    used = {"lm_head.weight"} if tied else set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if tied and name == "lm_head.weight":
            continue
        source, view = _view(name, tuple(parameter.shape), config, served)
        if view.dtype != dtype:
            raise refuse(f"{source} is {view.dtype} but model.embed_tokens.weight is {dtype}")
        used.add(source)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))
    if tied:
        model.tie_weights()
    for name in served:
        if name not in used:
            raise refuse(f"{name} of the served model has no place in {type(model).__name__}")


def _view(name: str, shape: tuple[int, ...], config: Any, served: dict[str, Tensor]) -> tuple[str, Tensor]:
    """(name of the served parameter, view of it) for one parameter of the skeleton."""
    owner, _, leaf = name.rpartition(".")
    prefix, _, module = owner.rpartition(".")
    source = f"{prefix}.{FUSED[module]}.{leaf}" if module in FUSED else name
    tensor = served.get(source)
    if tensor is None:
        raise refuse(f"the served model has no parameter {source}")
    if module in ("q_proj", "k_proj", "v_proj"):
        tensor = _split_qkv(source, module, tensor, config)
    elif module in ("gate_proj", "up_proj"):
        half = tensor.shape[0] // 2  # of the padded size: the halves are padded each
        tensor = tensor[:half] if module == "gate_proj" else tensor[half:]
    for axis, size in enumerate(shape):
        if tensor.dim() == len(shape) and tensor.shape[axis] > size and _may_be_padded(module, axis):
            tensor = tensor.narrow(axis, 0, size)
    if tuple(tensor.shape) != shape:
        raise refuse(f"{source} gives shape {tuple(tensor.shape)} for {name}, which needs {shape}")
    return source, tensor


def _may_be_padded(module: str, axis: int) -> bool:
    """SGLang pads vocabularies (rows) and, on a CPU, intermediate sizes."""
    if axis == 0:
        return module in ("embed_tokens", "lm_head", "gate_proj", "up_proj")
    return module == "down_proj"


def _split_qkv(source: str, module: str, tensor: Tensor, config: Any) -> Tensor:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    if tensor.shape[0] != queries + 2 * keys:
        raise refuse(
            f"{source} has {tensor.shape[0]} rows; {config.num_attention_heads} query and "
            f"{config.num_key_value_heads} key-value heads of {head} make {queries + 2 * keys}"
        )
    start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[module]
    return tensor.narrow(0, start, queries if module == "q_proj" else keys)

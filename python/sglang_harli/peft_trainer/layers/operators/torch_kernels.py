"""The operators of a layer by torch's own kernels of a device; none waits for it.

Fewer launches, and no copies between layouts: heads lie token-major throughout, query and key are
rotated as one, factors go into the products, sums are written where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.layers.attention import CausalAttention
from sglang_harli.peft_trainer.layers.operators.device_attention import DeviceAttention
from sglang_harli.peft_trainer.layers.operators.plain import Gate, Heads, LoraPart, Operators
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.rotary import RotaryTable
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors

_aten = torch.ops.aten


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


# transformers' module of an activation -> its gradient (the output's, the input, where it goes).
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "SiLU": _silu_backward,
    "SiLUActivation": _silu_backward,
    "GELUActivation": _gelu_backward,
    "GELUTanh": _gelu_tanh_backward,
    "PytorchGELUTanh": _gelu_tanh_backward,
    "ReLU": _relu_backward,
}


class TorchOperators(Operators):
    """The operators of a device.  ``flash``: whether it has torch's flash kernel (compute
    capability 8.0 or more)."""

    token_major = True

    def __init__(self, *, flash: bool) -> None:
        self.flash = flash

    def supports(self, activation: Any) -> bool:
        return type(activation).__name__ in ACTIVATIONS

    # ---- sums and norms
    def add(self, added: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.add(added, x, out=added if out is None else out)

    def rms_norm(self, norm: RmsNorm, x: Tensor, trace: SavedTensors | None) -> Tensor:
        out, factor = _aten._fused_rms_norm(x, norm.weight.shape, norm.weight, norm.epsilon)
        if trace is not None:
            trace[norm.name], trace[norm.name + " factor"] = x, factor
        return out

    def rms_norm_backward(
        self,
        norm: RmsNorm,
        grad: Tensor,
        trace: SavedTensors,
        passed: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        x, factor = trace[norm.name], trace[norm.name + " factor"]
        found, _ = _aten._fused_rms_norm_backward(
            grad, x, norm.weight.shape, factor, norm.weight, [True, False]
        )
        if passed is not None:
            return torch.add(found, passed, out=found if out is None else out)
        return found if out is None else out.copy_(found)

    # ---- heads and attention
    def attention(self, scale: float, repeats: int, window: int | None) -> CausalAttention:
        return DeviceAttention(scale, repeats, window, flash=self.flash)

    def split_heads(
        self, flat: Tensor, heads: Heads, rotary: RotaryTable, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        width, size = rotary[0].shape[1], heads.head_dim
        values = heads.columns[2]
        both = flat[:, : values.start].view(len(flat) // width, width, -1, size)
        query_heads = heads.columns[0].stop // size
        if heads.norms is not None:
            turned = torch.empty_like(both, memory_format=torch.contiguous_format)
            for norm, part in zip(heads.norms, (slice(query_heads), slice(query_heads, None)), strict=True):
                _rotate(self.rms_norm(norm, both[:, :, part], trace), rotary, turned[:, :, part])
        else:
            turned = torch.empty_like(both, memory_format=torch.contiguous_format)
            _rotate(both, rotary, turned)
        if trace is not None:
            trace["cos"], trace["sin"] = rotary
        query, key = turned[:, :, :query_heads], turned[:, :, query_heads:]
        value = flat[:, values].view(*both.shape[:2], -1, size)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def split_heads_backward(
        self, query: Tensor, key: Tensor, value: Tensor, heads: Heads, trace: SavedTensors
    ) -> Tensor:
        rows, query_heads, width, size = query.shape
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        flat = query.new_empty(rows * width, heads.columns[-1].stop)
        every = flat.view(rows, width, -1, size)
        turned, rotary = torch.cat((query, key), 2), (trace["cos"], trace["sin"])
        both = every[:, :, : turned.shape[2]]
        if heads.norms is None:
            _rotate(turned, rotary, both, back=True)
        else:
            grad = torch.empty_like(turned, dtype=flat.dtype)
            _rotate(turned, rotary, grad, back=True)
            for norm, part in zip(heads.norms, (slice(query_heads), slice(query_heads, None)), strict=True):
                self.rms_norm_backward(norm, grad[:, :, part], trace, out=both[:, :, part])
        every[:, :, turned.shape[2] :].copy_(value)
        return flat

    # ---- the MLP's activation
    def _activated(self, inputs: Tensor, gate: Gate, trace: SavedTensors | None) -> Tensor:
        return F.silu(inputs) if gate.silu else gate.activation(inputs)

    def _activation_backward(
        self, grad: Tensor, inputs: Tensor, gate: Gate, trace: SavedTensors, out: Tensor
    ) -> None:
        ACTIVATIONS[type(gate.activation).__name__](grad, inputs, out)

    # ---- LoRA products: the scale is the product's own factor
    def low_products(self, x: Tensor, a: Tensor, scaling: float) -> Tensor:
        low = x.new_empty(len(x), len(a))
        return low.addmm_(x, a.t(), beta=0.0, alpha=scaling)

    def lora_backward(
        self,
        grad: Tensor,
        low: Tensor,
        parts: Sequence[LoraPart],
        scaling: float,
        grad_b: Sequence[Tensor],
    ) -> Tensor:
        grad_low = torch.empty_like(low)
        for part, found in zip(parts, grad_b, strict=True):
            out = grad[:, part.columns]
            grad_low[:, part.rank].addmm_(out, part.b, beta=0.0, alpha=scaling)
            torch.mm(out.t(), low[:, part.rank], out=found)
        return grad_low

    # ---- many tensors at once: a launch for tens of them
    def zero(self, tensors: Sequence[Tensor]) -> None:
        for alike in _by_dtype(tensors):
            torch._foreach_zero_(alike)

    def copy(self, into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        source_of = {id(place): source for place, source in zip(into, sources, strict=True)}
        for alike in _by_dtype(into):
            torch._foreach_copy_(alike, [source_of[id(place)] for place in alike])

    def add_all(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        torch._foreach_add_(list(totals), list(parts))

    def scale(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        torch._foreach_mul_(list(tensors), factor)

    def norms(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        torch.stack(torch._foreach_norm(list(tensors)), out=out)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """torch's kernels of many tensors take one dtype at once; others go one by one."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _rotate(x: Tensor, rotary: RotaryTable, out: Tensor, *, back: bool = False) -> None:
    """``x`` rotated by its positions into ``out``, both ``[rows, width, heads, size]``; ``back``:
    by their negatives, which is the gradient."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    half = x.shape[-1] // 2
    sign = -1 if back else 1
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., half:] if back else sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half] if back else sin[..., half:], value=sign)

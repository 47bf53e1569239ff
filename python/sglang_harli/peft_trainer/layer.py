"""One decoder layer of the supported architectures, written for short quanta.

    x ─ norm ─ q,k,v ─ (head norms) ─ rotary ─ attention ─ o ─(+x)─ norm ─ gate,up ─ silu·mul ─ down ─(+)─

Llama, Mistral, Qwen2 and Qwen3 differ here in biases, head norms and the window only, all of which are
read off the transformers layer.  The result is transformers' own (the oracle's tests hold it to that);
the difference is in passes over memory, kernel launches and autograd nodes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.attention import CausalAttention
from sglang_harli.peft_trainer.lora_linear import LinearGroup


class LayerProgram:
    """Runs one layer on ``[rows, width, hidden]``; the weights stay where they are.

    Args:
        layer: transformers' decoder layer (with or without peft's modules in it).
        groups: its linears by ``INPUT_GROUPS``: q k v, o, gate up, down.
        window: tokens that a position attends to, or None for all before it.
    """

    def __init__(self, layer: Any, groups: list[LinearGroup], window: int | None) -> None:
        self.qkv, self.o, self.gate_up, self.down = groups
        attention = layer.self_attn
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self.head_dim: int = attention.head_dim
        self.attend = CausalAttention(attention.scaling, attention.num_key_value_groups, window)
        self.activation = layer.mlp.act_fn

    @property
    def leaves(self) -> list[Tensor]:
        """Adapter weights in the order of the layer's block."""
        return [leaf for group in (self.qkv, self.o, self.gate_up, self.down) for leaf in group.leaves]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output.  ``rotary``: (cos, sin), each ``[1, width, head_dim]``."""
        middle, (last,) = self._halves(x, rotary, values=True)
        return middle + last

    def gradients(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], grad: Tensor, inputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the layer again and differentiate it: for each of ``inputs`` its gradient.

        The output itself is not needed, so its last product is left out.
        """
        middle, (last,) = self._halves(x, rotary, values=False)
        return torch.autograd.grad((middle, last), inputs, (grad, grad))

    def _halves(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], *, values: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x after attention, what the MLP adds to it)."""
        middle = x + self._attention(rms_norm(self.norms[0], x), rotary)
        gate, up = self.gate_up(rms_norm(self.norms[1], middle))
        return middle, self.down(self.activation(gate) * up, values=values)

    def _attention(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        rows, width, _ = x.shape
        query, key, value = (out.view(rows, width, -1, self.head_dim) for out in self.qkv(x))
        if self.head_norms[0] is not None:
            query, key = rms_norm(self.head_norms[0], query), rms_norm(self.head_norms[1], key)
        cos, sin = (part.unsqueeze(2) for part in rotary)
        query, key = (_Rotate.apply(heads, cos, sin).transpose(1, 2) for heads in (query, key))
        out = self.attend(query, key, value.transpose(1, 2))
        return self.o(out.transpose(1, 2).reshape(rows, width, -1))[0]


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """What transformers' RMSNorm ``module`` gives, computed in fp32; gradient for x only."""
    if x.dtype == torch.float64:  # tests: bit for bit transformers' own, which rounds to fp32 on the way
        return module(x)
    if x.is_cuda:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return _RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        normed = x * factor  # fp32
        grad = grads[0] * weight.float()
        along = (grad * normed).mean(dim=-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(factor).to(x.dtype), None, None


class _Rotate(torch.autograd.Function):
    """Rotary embedding of ``[rows, width, heads, head_dim]``; cos and sin ``[1, width, 1, head_dim]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        return out, None, None

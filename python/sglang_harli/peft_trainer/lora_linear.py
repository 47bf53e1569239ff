"""The arithmetic of one LoRA linear: what peft's module computes, in fewer passes over memory.

peft's own forward makes three passes over the output (product, scaling, sum) and leaves autograd five
nodes a module; small quanta are bound by just that.  peft still makes the modules, their weights and
their names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.dropout import DropoutMasks


class _LoraProduct(torch.autograd.Function):
    """``x W' + bias + scaling * (mask * x) A' B'`` with gradients for x, A and B only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = torch.mm(flat if mask is None else flat * mask, a.t())
        ctx.save_for_backward(flat, low, a, b, weight, mask)
        ctx.scaling, ctx.shape = scaling, x.shape
        out = F.linear(flat, weight, bias)
        return out.addmm_(low, b.t(), alpha=scaling).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, a, b, weight, mask = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = torch.mm(grad, b).mul_(ctx.scaling)
        grad_b = torch.mm(grad.t(), low).mul_(ctx.scaling)
        grad_a = torch.mm(grad_low.t(), flat if mask is None else flat * mask)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight)
            if mask is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.addcmul_(torch.mm(grad_low, a), mask)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None, None


class LoraForward:
    """Stands in for the forward of one peft LoRA module.

    Args:
        base: the frozen linear, ``[out, in]``.
        a, b: the weights computed with, ``[r, in]`` and ``[out, r]``, in the base's dtype.
        scaling: the factor on B·A.
        layer, module: where the linear stands; key of its dropout masks.
        masks: None when nothing is dropped.
    """

    __slots__ = ("a", "b", "base", "layer", "masks", "module", "scaling")

    def __init__(
        self,
        base: torch.nn.Linear,
        a: Tensor,
        b: Tensor,
        scaling: float,
        layer: int,
        module: str,
        masks: DropoutMasks | None,
    ) -> None:
        self.base, self.a, self.b, self.scaling = base, a, b, scaling
        self.layer, self.module, self.masks = layer, module, masks

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in x's dtype."""
        mask = None if self.masks is None else self.masks.draw(self.layer, self.module, x.shape[-1])
        return _LoraProduct.apply(x, self.a, self.b, self.base.weight, self.base.bias, self.scaling, mask)  # type: ignore[no-any-return]

"""The arithmetic of LoRA linears that read the same input: what peft's modules compute, in fewer passes.

peft's own forward makes three passes over each output (product, scaling, sum), one thin product per
matrix, and leaves autograd five nodes a module; small quanta are bound by just that.  Here the A
matrices of q, k and v (or gate and up) are one product, and the whole group is one node.  peft still
makes the modules, their weights and their names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_harli.peft_trainer.dropout import DropoutMasks

# q, k and v read one tensor, gate and up another.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class LinearGroup:
    """Frozen linears on one input, some or all of them with an adapter.

    Args:
        names: their own names, such as ``q_proj``; ``linears`` likewise.
        linears: the frozen ones, ``[out, in]`` each.
        adapted: indices of those with an adapter, rising.
        a: ``[len(adapted) * r, in]``, the A matrices one below the other; None: no adapters.
        b: ``[out, r]`` each.
        scaling: the factor on B·A.
        layer: key of the dropout masks.
        masks: None when nothing is dropped.
    """

    def __init__(
        self,
        names: list[str],
        linears: list[nn.Linear],
        adapted: list[int],
        a: Tensor | None,
        b: list[Tensor],
        *,
        scaling: float,
        layer: int,
        masks: DropoutMasks | None,
    ) -> None:
        self.names, self.linears, self.adapted = names, linears, adapted
        self.a, self.b, self.scaling = a, b, scaling
        self.layer, self.masks = layer, masks
        self.rank = b[0].shape[1] if b else 0
        self.weights = [linear.weight for linear in linears]

    @property
    def leaves(self) -> list[Tensor]:
        """What autograd differentiates for: A's as one, then each B."""
        return [] if self.a is None else [self.a, *self.b]

    def __call__(self, x: Tensor, *, values: bool = True) -> tuple[Tensor, ...]:
        """``[..., in]`` to one ``[..., out]`` for each linear.

        Args:
            values: False leaves the outputs undefined: only their gradients are wanted.
        """
        masks = None
        if self.masks is not None and self.adapted:
            masks = [self.masks.draw(self.layer, self.names[i], x.shape[-1]) for i in self.adapted]
        return _GroupProduct.apply(x, self, masks, values, *self.leaves)  # type: ignore[no-any-return]


class _GroupProduct(torch.autograd.Function):
    """``x W' + bias + scaling * (mask * x) A' B'`` for each linear, with gradients for x, A and B only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: LinearGroup, masks: list[Tensor] | None, values: bool, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        low = None
        if leaves:
            low = _down(flat, leaves[0], masks, group.rank)
        outs = []
        for linear in group.linears:
            if values:
                outs.append(F.linear(flat, linear.weight, linear.bias))
            else:
                outs.append(flat.new_empty(len(flat), linear.out_features))
        if values and low is not None:
            for place, i in enumerate(group.adapted):
                outs[i].addmm_(_part(low, place, group.rank), leaves[1 + place].t(), alpha=group.scaling)
        ctx.save_for_backward(flat, low, *leaves)
        ctx.group, ctx.masks, ctx.shape = group, masks, x.shape
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group: LinearGroup = ctx.group
        flat, low, *leaves = ctx.saved_tensors
        flat_grads = [grad.reshape(len(flat), -1) for grad in grads]
        grad_low, grad_b = None, []
        if leaves:
            grad_low = torch.empty_like(low)
            for place, i in enumerate(group.adapted):
                torch.mm(flat_grads[i], leaves[1 + place], out=_part(grad_low, place, group.rank))
                grad_b.append(torch.mm(flat_grads[i].t(), _part(low, place, group.rank)).mul_(group.scaling))
            grad_low.mul_(group.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(flat_grads[0], group.weights[0])
            for grad, weight in zip(flat_grads[1:], group.weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
        if grad_low is None:
            return _shaped(grad_x, ctx.shape), None, None, None
        if ctx.masks is None:
            grad_a = torch.mm(grad_low.t(), flat)
            if grad_x is not None:
                grad_x.addmm_(grad_low, leaves[0])
        else:
            grad_a = torch.empty_like(leaves[0])
            for place, mask in enumerate(ctx.masks):
                part = _part(grad_low, place, group.rank)
                rows = slice(place * group.rank, (place + 1) * group.rank)
                torch.mm(part.t(), flat * mask, out=grad_a[rows])
                if grad_x is not None:
                    grad_x.addcmul_(torch.mm(part, leaves[0][rows]), mask)
        return _shaped(grad_x, ctx.shape), None, None, None, grad_a, *grad_b


def _part(low: Tensor, place: int, rank: int) -> Tensor:
    return low[:, place * rank : (place + 1) * rank]


def _down(flat: Tensor, a: Tensor, masks: list[Tensor] | None, rank: int) -> Tensor:
    """``[tokens, adapters * r]``: the input through every A of the group."""
    if masks is None:
        return torch.mm(flat, a.t())
    parts = [(flat * mask, a[i * rank : (i + 1) * rank]) for i, mask in enumerate(masks)]
    return torch.cat([torch.mm(dropped, rows.t()) for dropped, rows in parts], dim=1)


def _shaped(grad: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if grad is None else grad.view(shape)

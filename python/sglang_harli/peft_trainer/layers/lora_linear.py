"""LoRA linears that read the same input: what peft's modules compute, in fewer passes.

peft's own forward makes three passes over each output (product, scaling, sum), one thin product per
matrix, and leaves autograd five nodes a module; small quanta are bound by just that. Here the A
matrices of q, k and v (or gate and up) are one product, their outputs lie side by side in one
tensor, the frozen weights are one product where they are one tensor (SGLang's ``qkv_proj`` and
``gate_up_proj``), and the backward is written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sglang_harli.peft_trainer.layers.dropout import DropoutMasks
from sglang_harli.peft_trainer.layers.operators.plain import LoraPart, Operators
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors


class LinearGroup:
    """Frozen linears on one input, some or all of them with an adapter.

    Args:
        names: of the ``linears``, such as ``q_proj``; linears: frozen, ``[out, in]`` each.
        adapted: indices of those with an adapter, rising.
        a: ``[len(adapted) * r, in]``, the A matrices one below the other; None: no adapters.
        b: ``[out, r]`` each; scaling: the factor on B·A.
        layer: key of the dropout masks; masks: None when nothing is dropped.
        operators: of the device; None: those of a CPU.

    Attributes:
        leaves: what is differentiated for: A's as one, then each B.
        columns: of the output, each linear's.
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
        operators: Operators | None = None,
    ) -> None:
        self.names, self.linears, self.adapted = names, linears, adapted
        self.a, self.b, self.scaling = a, b, scaling
        self.layer, self.masks = layer, masks if adapted else None
        self.leaves: list[Tensor] = [] if a is None else [a, *b]
        self.rank = b[0].shape[1] if b else 0
        ends = list(itertools.accumulate((linear.out_features for linear in linears), initial=0))
        self.width, self.columns = ends[-1], [slice(*span) for span in itertools.pairwise(ends)]
        self._parts = [
            LoraPart(slice(k * self.rank, (k + 1) * self.rank), self.columns[i], matrix)
            for k, (i, matrix) in enumerate(zip(adapted, b, strict=True))
        ]
        self._operators = Operators() if operators is None else operators
        self._frozen = self._products()

    def _products(self) -> list[tuple[Tensor, Tensor | None, slice]]:
        """(weight, bias, columns): one for all where weights adjoin in memory, else one each."""
        weights = [linear.weight.detach() for linear in self.linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in self.linears]
        whole = _joined(weights)
        if whole is not None and all(bias is None for bias in biases):
            return [(whole, None, slice(0, self.width))]
        given = [bias for bias in biases if bias is not None]
        if whole is not None and len(given) == len(biases) and (bias := _joined(given)) is not None:
            return [(whole, bias, slice(0, self.width))]
        return list(zip(weights, biases, self.columns, strict=True))

    def forward(self, x: Tensor, trace: SavedTensors | None, *, values: bool = True) -> Tensor:
        """``[tokens, in]`` to ``[tokens, width]``; ``trace`` remembers what ``backward`` needs.
        ``values`` False: the output is not wanted and undefined."""
        out = x.new_empty(len(x), self.width)
        if values:
            for weight, bias, columns in self._frozen:
                if bias is None:
                    torch.mm(x, weight.t(), out=out[:, columns])
                else:
                    torch.addmm(bias, x, weight.t(), out=out[:, columns])
        if self.a is None or (trace is None and not values):
            return out
        masks = self._draw_masks(x.shape[1])
        low = self._down(x, masks)
        if values:
            self._operators.add_lora(out, low, self._parts)
        if trace is not None:
            trace["x " + self.names[0]], trace["low " + self.names[0]] = x, low
            if masks is not None and not trace.kept:
                trace.masks[self.names[0]] = masks
        return out

    def _down(self, x: Tensor, masks: list[Tensor] | None) -> Tensor:
        """``[tokens, adapters * r]``: the input through every A of the group, scaled."""
        assert self.a is not None
        if masks is None:
            return self._operators.low_products(x, self.a, self.scaling)
        low = x.new_empty(len(x), len(self.a))
        for part, mask in zip(self._parts, masks, strict=True):
            torch.mm(x * mask, self.a[part.rank].t(), out=low[:, part.rank])
        return low if self.scaling == 1.0 else low.mul_(self.scaling)

    def backward(
        self, grad: Tensor, trace: SavedTensors, leaf_grads: Sequence[Tensor], *, wants_x: bool
    ) -> Tensor | None:
        """The input's gradient ``[tokens, in]``; those of ``leaves`` are written to ``leaf_grads``.
        ``grad``: ``[tokens, width]``; ``leaf_grads``: contents undefined before."""
        grad_x = None
        if wants_x:
            for weight, _, columns in self._frozen:
                part = grad[:, columns]
                grad_x = torch.mm(part, weight) if grad_x is None else grad_x.addmm_(part, weight)
        if self.a is None:
            return grad_x
        x, low = trace["x " + self.names[0]], trace["low " + self.names[0]]
        grad_low = self._operators.lora_backward(grad, low, self._parts, self.scaling, leaf_grads[1:])
        if self.masks is None:
            torch.mm(grad_low.t(), x, out=leaf_grads[0])
            return grad_x if grad_x is None else grad_x.addmm_(grad_low, self.a)
        masks = trace.masks.get(self.names[0]) or self._draw_masks(x.shape[1])
        assert masks is not None
        for part, mask in zip(self._parts, masks, strict=True):
            torch.mm(grad_low[:, part.rank].t(), x * mask, out=leaf_grads[0][part.rank])
            if grad_x is not None:
                grad_x.addcmul_(torch.mm(grad_low[:, part.rank], self.a[part.rank]), mask)
        return grad_x

    def _draw_masks(self, features: int) -> list[Tensor] | None:
        """Dropout masks of the adapted linears for the rows that are set; None: no dropout."""
        if self.masks is None or self.masks.off:
            return None
        return [self.masks.draw(self.layer, self.names[i], features) for i in self.adapted]


def _joined(parts: list[Tensor]) -> Tensor | None:
    """One tensor over all of them where each begins in memory at the end of the one before."""
    first, rows = parts[0], 0
    for part in parts:
        begin = first.storage_offset() + rows * first.stride(0)
        if (
            part.untyped_storage()._cdata != first.untyped_storage()._cdata
            or not part.is_contiguous()
            or part.storage_offset() != begin
        ):
            return None
        rows += len(part)
    return first.as_strided((rows, *first.shape[1:]), first.stride())

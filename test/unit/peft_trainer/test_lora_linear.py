"""Linears on one input: SGLang's fused tensors are one product, and the numbers are those of
separate ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sglang_harli.peft_trainer.layers.lora_linear import LinearGroup
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors
from support.trainer.trainer_oracle import one_thread

__all__ = ["one_thread"]  # a fixture

SIZES, WIDTH, RANK = (12, 6, 6), 16, 3


def group(adapted: list[int], *, fused: bool, bias: bool) -> LinearGroup:
    torch.manual_seed(0)
    weight, offsets = torch.randn(sum(SIZES), WIDTH, dtype=torch.float64), torch.randn(sum(SIZES)).double()
    linears = []
    for part, shift in zip(weight.split(SIZES), offsets.split(SIZES), strict=True):
        linear = nn.Linear(WIDTH, len(part), bias=bias, dtype=torch.float64).requires_grad_(False)
        linear.weight.data = part if fused else part.clone()
        if bias:
            linear.bias.data = shift if fused else shift.clone()
        linears.append(linear)
    a = torch.randn(len(adapted) * RANK, WIDTH, dtype=torch.float64) if adapted else None
    b = [torch.randn(SIZES[i], RANK, dtype=torch.float64) for i in adapted]
    return LinearGroup(["q", "k", "v"], linears, adapted, a, b, scaling=0.7, layer=0, masks=None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [[0, 1, 2], [1], [0, 2], []])
def test_fused_and_separate_weights_give_what_autograd_gives(adapted: list[int], bias: bool) -> None:
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    grad = torch.randn(5, sum(SIZES), dtype=torch.float64)
    for fused in (False, True):
        mine = group(adapted, fused=fused, bias=bias)
        assert len(mine._frozen) == (1 if fused else 3)
        entered = x.clone().requires_grad_()
        leaves = [leaf.clone().requires_grad_() for leaf in mine.leaves]
        outs = [linear(entered) for linear in mine.linears]
        for place, i in enumerate(adapted):
            low = entered @ leaves[0][place * RANK : (place + 1) * RANK].t()
            outs[i] = outs[i] + 0.7 * low @ leaves[1 + place].t()
        expected = torch.cat(outs, 1)
        grads = torch.autograd.grad(expected, [entered, *leaves], grad)
        trace, own = SavedTensors(), [torch.full_like(leaf, torch.nan) for leaf in mine.leaves]
        with torch.no_grad():
            torch.testing.assert_close(mine.forward(x, trace), expected)
            below = mine.backward(grad, trace, own, wants_x=True)
            assert mine.backward(grad, trace, own, wants_x=False) is None
        assert below is not None
        torch.testing.assert_close([below, *own], list(grads))


def test_weights_with_something_between_them_stay_separate() -> None:
    """SGLang pads intermediate sizes on a CPU: gate's rows do not end where up's begin."""
    padded = torch.randn(32, WIDTH)
    linears = [nn.Linear(WIDTH, 12, bias=False).requires_grad_(False) for _ in range(2)]
    linears[0].weight.data, linears[1].weight.data = padded[:12], padded[16:28]
    mine = LinearGroup(["gate", "up"], linears, [], None, [], scaling=1.0, layer=0, masks=None)
    assert len(mine._frozen) == 2
    x = torch.randn(3, WIDTH)
    expected = torch.cat([x @ padded[:12].t(), x @ padded[16:28].t()], 1)
    torch.testing.assert_close(mine.forward(x, None), expected)

"""SwiGLU's kernels against torch's own operators, which round the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.kernels import gated
from support.kernels.closeness import DTYPES, assert_near
from support.kernels.interpreter import interpreted

SHAPES = [(1, 8), (17, 96), (130, 40), (2, 1500)]


def inputs(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    both = (torch.randn(tokens, 2 * width, generator=generator) * 3).to(dtype)
    both[0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0])
    return both, torch.randn(tokens, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_forward(tokens, width, dtype):
    both, _ = inputs(tokens, width, dtype)
    with interpreted() as names:
        found = gated.swiglu(both)
    assert_near(found, F.silu(both[:, :width]) * both[:, width:], steps=1 if dtype == torch.bfloat16 else 4)
    assert names == ["_forward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_backward(tokens, width, dtype):
    both, grad = inputs(tokens, width, dtype)
    exact = both.double().requires_grad_()
    with torch.enable_grad():
        product = F.silu(exact[:, :width]) * exact[:, width:]
        (wanted,) = torch.autograd.grad(product, exact, grad.double())
    with interpreted() as names:
        found = gated.swiglu_backward(grad, both)
    assert_near(found, wanted, steps=2 if dtype == torch.bfloat16 else 16)
    assert found.isfinite().all()
    assert names == ["_backward"]


def test_in_place_in_any_order():
    both, grad = inputs(7, 2100, torch.bfloat16)
    with interpreted():
        wanted = gated.swiglu_backward(grad, both)
    with interpreted(seed=3):
        found = gated.swiglu_backward(grad, both, out=both)
    assert found is both and torch.equal(found, wanted)

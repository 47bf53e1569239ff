"""RMSNorm's kernels against torch: with a sum, in slices of rows, and the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.kernels import norm
from support.kernels.closeness import DTYPES, assert_near
from support.kernels.interpreter import interpreted

SHAPES = [(1, 1, 64), (1, 17, 896), (5, 26, 80), (2, 3, 2304)]
EPSILON = 1e-6


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_backward(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    exact = x.double().requires_grad_()
    with torch.enable_grad():
        out = F.rms_norm(exact, weight.shape, weight.double(), EPSILON)
        return torch.autograd.grad(out, exact, grad.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_alone_and_behind_a_sum(shape, dtype):
    x, added, weight = (
        draw(*shape, dtype=dtype),
        draw(*shape, dtype=dtype, seed=1),
        draw(shape[-1], dtype=dtype),
    )
    with interpreted() as names:
        out, factors = norm.rms_norm(x, weight, EPSILON)
        total, normed, _ = norm.add_rms_norm(x, added, weight, EPSILON)
    wanted = F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON)
    assert_near(out, wanted, steps=1 if dtype == torch.bfloat16 else 8)
    assert_near(factors, (x.double().square().mean(-1) + EPSILON).rsqrt().view(-1), steps=8)
    assert torch.equal(total, x + added)
    wanted = F.rms_norm((x + added).double(), weight.shape, weight.double(), EPSILON)
    assert_near(normed, wanted, steps=1 if dtype == torch.bfloat16 else 8)
    assert names == ["_forward"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_with_and_without_another_gradient(shape, dtype):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
    grad, passed = draw(*shape, dtype=dtype, seed=2), draw(*shape, dtype=dtype, seed=3)
    wanted = exact_backward(x, weight, grad)
    with interpreted() as names:
        _, factors = norm.rms_norm(x, weight, EPSILON)
        alone = norm.rms_norm_backward(grad, x, factors, weight)
        both = norm.rms_norm_backward(grad, x, factors, weight, passed)
    steps = 1 if dtype == torch.bfloat16 else 32
    assert_near(alone, wanted, steps=steps)
    assert_near(both, wanted + passed.double(), steps=steps)
    assert names == ["_forward", "_backward", "_backward"]


def test_rows_are_read_and_written_where_they_lie():
    """Ranges of wider rows, and the gradient in the place of the one that came, in any order."""
    weight = draw(96, dtype=torch.bfloat16)
    wide = draw(3, 9, 96, dtype=torch.bfloat16)
    x, passed = wide[:, :5], draw(3, 12, 96, dtype=torch.bfloat16, seed=4)
    grad = draw(3, 5, 96, dtype=torch.bfloat16, seed=5)
    beyond = passed[:, 5:].clone()
    with interpreted(seed=1):
        out, factors = norm.rms_norm(x, weight, EPSILON)
        wanted = norm.rms_norm_backward(grad, x.contiguous(), factors, weight, passed[:, :5].contiguous())
        given = passed[:, :5]
        found = norm.rms_norm_backward(grad, x, factors, weight, given, out=given)
    assert out.is_contiguous()
    assert_near(out, F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON), steps=1)
    assert found is given and torch.equal(found, wanted)
    assert torch.equal(passed[:, 5:], beyond)


def test_the_sum_may_take_the_place_of_what_is_added():
    x, weight = draw(2, 7, 64, dtype=torch.bfloat16)[:, :4], draw(64, dtype=torch.bfloat16)
    added = draw(2, 4, 64, dtype=torch.bfloat16, seed=1)
    wanted = x + added
    with interpreted(seed=2):
        total, _, _ = norm.add_rms_norm(x, added, weight, EPSILON, total=added)
    assert total is added and torch.equal(total, wanted)


def test_tokens_without_rows():
    x, weight = draw(6, 64, dtype=torch.float32), draw(64, dtype=torch.float32)
    with interpreted():
        out, factors = norm.rms_norm(x, weight, EPSILON)
        back = norm.rms_norm_backward(x, x, factors, weight)
    assert_near(out, F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON), steps=8)
    assert_near(back, exact_backward(x, weight, x), steps=64)

"""A group's LoRA products in one launch each way, against a product for each matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sglang_harli.peft_trainer.kernels import lora
from support.kernels.closeness import DTYPES, assert_near
from support.kernels.interpreter import interpreted

# Columns of the group's linears, which of them are adapted, the rank, tokens.
GROUPS = [
    ((256, 64, 64), (0, 1, 2), 16, 17),
    ((96, 40), (0, 1), 8, 130),
    ((130,), (0,), 64, 1),
    ((48, 32, 200), (0, 2), 24, 70),
    ((24, 130, 16, 70), (0, 1, 2, 3), 32, 65),
    ((40, 72), (1,), 1, 3),
    ((64,), (0,), 96, 9),
]


class Group:
    """Random matrices of one group; ``low`` is scaled already."""

    def __init__(self, columns: tuple[int, ...], adapted: tuple[int, ...], rank: int, tokens: int, dtype):
        generator = torch.Generator().manual_seed(rank + tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        ends = list(itertools.accumulate(columns, initial=0))
        spans = [slice(*span) for span in itertools.pairwise(ends)]
        self.columns = [spans[i] for i in adapted]
        self.ranks = [slice(i * rank, (i + 1) * rank) for i in range(len(adapted))]
        self.b = [draw(columns[i], rank) for i in adapted]
        self.low = draw(tokens, len(adapted) * rank)
        self.out = draw(tokens, ends[-1])
        self.grad_b = [torch.full_like(b, torch.nan) for b in self.b]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_forward(shape, dtype):
    group = Group(*shape, dtype)
    wanted = group.out.double()
    for columns, rank, b in zip(group.columns, group.ranks, group.b, strict=True):
        wanted[:, columns] += group.low[:, rank].double() @ b.double().t()
    with interpreted(seed=1) as names:
        lora.add_products(group.out, group.low, group.b, group.columns)
    assert_near(group.out, wanted, steps=1 if dtype == torch.bfloat16 else 64)
    assert names == ["_add_products"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_backward(shape, dtype):
    group, scaling = Group(*shape, dtype), 1.5
    grad = group.out
    with interpreted(seed=2) as names:
        found = lora.product_gradients(grad, group.low, group.b, group.columns, scaling, group.grad_b)
    steps = 1 if dtype == torch.bfloat16 else 128
    parts = zip(group.columns, group.ranks, group.b, group.grad_b, strict=True)
    for columns, rank, b, grad_b in parts:
        out = grad[:, columns].double()
        assert_near(found[:, rank], out @ b.double() * scaling, steps=steps)
        assert_near(grad_b, out.t() @ group.low[:, rank].double(), steps=steps)
    assert names == ["_product_gradients"]


def test_the_bits_are_the_same_each_time():
    results = []
    for seed in (None, 1, 2):
        group = Group((96, 40), (0, 1), 16, 200, torch.bfloat16)
        with interpreted(seed):
            low = lora.product_gradients(group.out, group.low, group.b, group.columns, 2.0, group.grad_b)
        results.append([low, *group.grad_b])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_is_not_adapted_stays():
    group = Group((48, 32, 200), (0, 2), 16, 5, torch.bfloat16)
    before = group.out[:, 48:80].clone()
    with interpreted():
        lora.add_products(group.out, group.low, group.b, group.columns)
    assert torch.equal(group.out[:, 48:80], before)


def test_too_many_linears_are_refused():
    group = Group((16,) * 5, (0, 1, 2, 3, 4), 16, 2, torch.float32)
    with interpreted(), pytest.raises(ValueError, match="1 to 4"):
        lora.add_products(group.out, group.low, group.b, group.columns)

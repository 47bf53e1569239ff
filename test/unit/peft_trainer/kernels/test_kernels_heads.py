"""The kernels of query and key heads against the layer's own rotation and transformers' norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.kernels import heads
from sglang_harli.peft_trainer.kernels.heads import HeadLayout, HeadNorms
from sglang_harli.peft_trainer.layers.rotary import RotaryTable, rotated, rotated_back
from support.kernels.closeness import DTYPES, assert_near
from support.kernels.interpreter import interpreted

LAYOUTS = [HeadLayout(4, 2, 64), HeadLayout(3, 1, 80), HeadLayout(10, 10, 128)]
EPSILON = 1e-6


def table(width: int, size: int, dtype: torch.dtype) -> RotaryTable:
    angles = torch.arange(width)[:, None] * torch.arange(1, size // 2 + 1) * 0.37
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms_of(layout: HeadLayout, dtype: torch.dtype) -> HeadNorms:
    return HeadNorms(draw(layout.size, dtype=dtype, seed=8), draw(layout.size, dtype=dtype, seed=9), EPSILON)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), EPSILON).to(x.dtype)


def split(flat: Tensor, rows: int, width: int, layout: HeadLayout) -> tuple[Tensor, ...]:
    return flat.view(rows, width, -1, layout.size).split([layout.queries, layout.keys, layout.keys], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_forward(layout, norm, dtype):
    rows, width = 2, 5
    flat, turn = draw(rows * width, layout.width, dtype=dtype), table(width, layout.size, dtype)
    norms = norms_of(layout, dtype) if norm else None
    query, key, _ = split(flat, rows, width, layout)
    if norms is not None:
        query, key = normed(query, norms.query), normed(key, norms.key)
    wanted = torch.cat([rotated(query, turn), rotated(key, turn)], 1).transpose(1, 2)
    with interpreted() as names:
        found = heads.rotate(flat, *turn, layout, norms)
    assert_near(found, wanted, steps=1 if dtype == torch.bfloat16 else 16)
    assert names == ["_rotate"]


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_forward_where_it_reads_in_any_order(table_dtype):
    layout, rows, width = HeadLayout(20, 5, 64), 1, 17
    flat, turn = draw(width, layout.width, dtype=torch.bfloat16), table(width, layout.size, table_dtype)
    values = split(flat, rows, width, layout)[2].clone()
    with interpreted():
        wanted = heads.rotate(flat, *turn, layout, None)
    with interpreted(seed=5):
        heads.rotate(flat, *turn, layout, None, out=flat)
    found = split(flat, rows, width, layout)
    assert torch.equal(torch.cat(found[:2], 2), wanted)
    assert torch.equal(found[2], values)


def exact_backward(
    grads: tuple[Tensor, ...], flat: Tensor, turn: RotaryTable, layout: HeadLayout, norms: HeadNorms | None
) -> Tensor:
    """In fp64, by the layer's own code and autograd; ``grads``: ``[rows, width, heads, size]``."""
    rows, width = grads[0].shape[:2]
    exact = flat.double().requires_grad_()
    cos, sin = turn[0].double(), turn[1].double()
    parts = []
    with torch.enable_grad():
        query, key, _ = split(exact, rows, width, layout)
        for grad, x, weight in zip(grads, (query, key), ("query", "key"), strict=False):
            back = torch.empty_like(grad, dtype=torch.float64, memory_format=torch.contiguous_format)
            rotated_back(grad.double().transpose(1, 2), (cos, sin), back)
            if norms is not None:
                gain = getattr(norms, weight).double()
                out = F.rms_norm(x, gain.shape, gain, EPSILON)
                back = torch.autograd.grad(out, exact, back)[0]
                back = split(back, rows, width, layout)[0 if weight == "query" else 1]
            parts.append(back)
    return torch.cat([*parts, grads[2].double()], 2).view(len(flat), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_backward(layout, norm, dtype):
    rows, width = 2, 5
    flat, turn = draw(rows * width, layout.width, dtype=dtype), table(width, layout.size, dtype)
    norms = norms_of(layout, dtype) if norm else None
    counts = (layout.queries, layout.keys, layout.keys)
    grads = tuple(draw(rows, width, n, layout.size, dtype=dtype, seed=i) for i, n in enumerate(counts))
    wanted = exact_backward(grads, flat, turn, layout, norms)
    with interpreted(seed=1) as names:
        found = heads.rotate_backward(*grads, flat, *turn, layout, norms)
    assert_near(found, wanted, steps=4 if dtype == torch.bfloat16 else 32)
    assert names == ["_rotate_back"]


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_keys_may_lie_head_by_head_and_be_fp32(exact):
    """As those of a block of a row do, which are summed in the exact dtype."""
    layout, rows, width = HeadLayout(4, 2, 64), 1, 6
    flat, turn = draw(width, layout.width, dtype=torch.bfloat16), table(width, layout.size, torch.float32)
    query = draw(rows, width, 4, 64, dtype=torch.bfloat16)
    dtype = torch.float32 if exact else torch.bfloat16
    key, value = (draw(rows, 2, 11, 64, dtype=dtype, seed=n)[:, :, 3:9].transpose(1, 2) for n in (1, 2))
    wanted = exact_backward((query, key, value), flat, turn, layout, None)
    with interpreted():
        found = heads.rotate_backward(query, key, value, flat, *turn, layout, None)
        dense = heads.rotate_backward(query, key.contiguous(), value, flat, *turn, layout, None)
    assert_near(found, wanted, steps=2)
    assert torch.equal(found, dense)

"""RMSNorm with a frozen weight, with or without a sum before it, forward and backward.

Inputs and outputs may be the first ``width`` tokens of each row of ``[rows, more, hidden]``: a
range of a micro-batch is computed where it lies. Arithmetic is fp32; the sum is rounded before it
is normed, as two operators would, and the normed value once, as torch's fused kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(normed over the last axis, contiguous; fp32 factors ``[tokens]`` for the backward).

    ``x``: ``[rows, width, hidden]`` or ``[tokens, hidden]``, each row contiguous.
    """
    out, factors = _like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    _launch_forward(x, None, out, weight, out, factors, epsilon)
    return out, factors


def add_rms_norm(
    x: Tensor, added: Tensor, weight: Tensor, epsilon: float, total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + added, that normed, factors): see ``rms_norm``. ``total``: where the sum goes; it may be
    ``added``. Both are contiguous."""
    total = _like(x) if total is None else total
    out, factors = _like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    _launch_forward(x, added, total, weight, out, factors, epsilon)
    return total, out, factors


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    factors: Tensor,
    weight: Tensor,
    passed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of x, into ``out`` if given.

    Args:
        grad: of the normed value, contiguous.
        passed: another gradient of x, added to it; as x, and may be ``out``.
    """
    out = _like(x) if out is None else out
    hidden, width = x.shape[-1], x.shape[-2]
    block = triton.next_power_of_2(hidden)
    launch(
        _backward,
        (x.numel() // hidden,),
        grad,
        x,
        factors,
        weight,
        x if passed is None else passed,
        out,
        width,
        _row_tokens(x),
        _row_tokens(x if passed is None else passed),
        _row_tokens(out),
        HIDDEN=hidden,
        PASSED=passed is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return out


def _launch_forward(
    x: Tensor,
    added: Tensor | None,
    total: Tensor,
    weight: Tensor,
    out: Tensor,
    factors: Tensor,
    epsilon: float,
) -> None:
    hidden, width = x.shape[-1], x.shape[-2]
    block = triton.next_power_of_2(hidden)
    launch(
        _forward,
        (x.numel() // hidden,),
        x,
        x if added is None else added,
        total,
        weight,
        out,
        factors,
        epsilon,
        width,
        _row_tokens(x),
        HIDDEN=hidden,
        ADDED=added is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _row_tokens(x: Tensor) -> int:
    """Tokens from one row to the next."""
    return x.shape[0] if x.dim() == 2 else x.stride(0) // x.shape[-1]


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit(do_not_specialize=["width", "x_row"])
def _forward(
    x, added, total, weight, out, factors, epsilon, width, x_row,
    HIDDEN: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < HIDDEN
    own = token.to(tl.int64) * HIDDEN + place
    there = ((token // width).to(tl.int64) * x_row + token % width) * HIDDEN + place
    value = tl.load(x + there, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if ADDED:
        value += tl.load(added + own, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
        tl.store(total + own, value.to(dtype), mask=inside)
    factor = tl.rsqrt(tl.sum(value * value, 0) / HIDDEN + epsilon)
    gain = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + own, (value * factor * gain).to(dtype), mask=inside)
    tl.store(factors + token, factor)


@triton.jit(do_not_specialize=["width", "x_row", "passed_row", "out_row"])
def _backward(
    grad, x, factors, weight, passed, out, width, x_row, passed_row, out_row,
    HIDDEN: tl.constexpr, PASSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < HIDDEN
    row = (token // width).to(tl.int64)
    column = token % width
    incoming = tl.load(grad + token.to(tl.int64) * HIDDEN + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + (row * x_row + column) * HIDDEN + place, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + token)
    normed = value * factor
    incoming *= gain
    along = tl.sum(incoming * normed, 0) / HIDDEN
    found = (incoming - normed * along) * factor
    if PASSED:
        beside = passed + (row * passed_row + column) * HIDDEN + place
        found += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (row * out_row + column) * HIDDEN + place, found.to(out.dtype.element_ty), mask=inside)

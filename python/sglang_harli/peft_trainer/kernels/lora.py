"""LoRA products of a group of linears on one input: one launch forward, one backward.

The group's outputs lie side by side, its low products (the input times every A, scaled) too, and
each adapted linear has its own B. Forward adds ``low @ B.T`` to each linear's columns. Backward is
two kinds of program in one launch: gradients of the low products, a reduction over a linear's
columns, and gradients of the B, a reduction over the tokens. Sums are fp32, each in one program and
in one order: the bits are the same each time.

A rank is taken in pieces of 16, 32 or 64; which tells the variants that are compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch

MOST = 4  # adapted linears of a group
TILE, EXACT_TILE = (64, 128), (32, 64)  # (tokens, columns) at once in 16 bits and in fp32
_NEVER = 2**30  # a block that none reaches
PIECES = (16, 32, 64)  # of a rank

T = TypeVar("T")


def add_products(out: Tensor, low: Tensor, b: Sequence[Tensor], columns: Sequence[slice]) -> None:
    """To each linear's ``columns`` of ``out`` its low products times its B.

    Args:
        out: ``[tokens, width]``, each token contiguous.
        low: ``[tokens, len(b) * rank]``, contiguous: scaled.
        b: ``[columns, rank]`` each, contiguous; at most 4.
    """
    rank, tile = b[0].shape[1], _tile(out)[0]
    piece, even = _pieces(rank, out)
    first, count, ends = _places(columns, tile)
    launch(
        _add_products,
        (triton.cdiv(len(out), tile), ends[len(b) - 1]),
        out,
        low,
        *_four(b),
        *first,
        *count,
        *ends[: MOST - 1],
        len(out),
        rank,
        low.shape[1],
        out.stride(0),
        PIECE=piece,
        EVEN=even,
        PRECISION=_precision(out),
        BLOCK=tile,
        num_warps=4,
        num_stages=2,
    )


def product_gradients(
    grad: Tensor,
    low: Tensor,
    b: Sequence[Tensor],
    columns: Sequence[slice],
    scaling: float,
    grad_b: Sequence[Tensor],
) -> Tensor:
    """The gradient of the low products before they were scaled, ``[tokens, len(b) * rank]``.

    Args:
        grad: ``[tokens, width]``, of the group's output, each token contiguous.
        grad_b: as ``b``; what the B's gradients are written to.
    """
    rank, grad_low = b[0].shape[1], low.new_empty(low.shape)
    piece, even = _pieces(rank, grad)
    block, across = _tile(grad)
    first, count, ends = _places(columns, block)
    pieces = triton.cdiv(rank, piece)
    low_programs = triton.cdiv(len(grad), block) * len(b) * pieces
    launch(
        _product_gradients,
        (low_programs + ends[len(b) - 1] * pieces,),
        grad,
        low,
        grad_low,
        *_four(b),
        *_four(grad_b),
        *first,
        *count,
        *ends[: MOST - 1],
        low_programs,
        len(b) * pieces,
        len(grad),
        rank,
        low.shape[1],
        grad.stride(0),
        scaling,
        PIECE=piece,
        EVEN=even,
        PRECISION=_precision(grad),
        BLOCK=block,
        ACROSS=across,
        num_warps=8 if piece == PIECES[-1] else 4,
        num_stages=3,
    )
    return grad_low


def _tile(x: Tensor) -> tuple[int, int]:
    return EXACT_TILE if x.dtype == torch.float32 else TILE


def _pieces(rank: int, x: Tensor) -> tuple[int, bool]:
    """(piece of the rank, whether it is made of whole pieces); fp32 has small ones only."""
    pieces = PIECES[:1] if x.dtype == torch.float32 else PIECES
    whole = [piece for piece in pieces if rank % piece == 0]
    return (whole[-1], True) if whole else (pieces[0], False)


def _precision(x: Tensor) -> str:
    """fp32 is not cut to TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _places(columns: Sequence[slice], block: int) -> tuple[list[int], list[int], list[int]]:
    """By linear, four each: its first column, its columns, and the end of its blocks of columns."""
    if not 0 < len(columns) <= MOST:
        raise ValueError(f"{len(columns)} adapted linears on one input: 1 to {MOST} are supported")
    first = [span.start for span in columns]
    count = [span.stop - span.start for span in columns]
    ends = list(itertools.accumulate(triton.cdiv(width, block) for width in count))
    return _four(first), _four(count), [*ends, *([_NEVER] * (MOST - len(ends)))]


def _four(values: Sequence[T]) -> list[T]:
    """What is not there is never read; it has the kind of the first."""
    return [*values, *([values[0]] * (MOST - len(values)))]


@triton.jit
def _linear(
    block, p0, p1, p2, p3, first0, first1, first2, first3, count0, count1, count2, count3, end0, end1, end2
):
    """Of the linear that this block of columns is in: its pointer, first column, columns; the block
    within it; its number."""
    pointer = p0
    first = first0
    count = count0
    own = block
    if block >= end0:
        pointer = p1
        first = first1
        count = count1
        own = block - end0
    if block >= end1:
        pointer = p2
        first = first2
        count = count2
        own = block - end1
    if block >= end2:
        pointer = p3
        first = first3
        count = count3
        own = block - end2
    number = (block >= end0).to(tl.int32) + (block >= end1).to(tl.int32) + (block >= end2).to(tl.int32)
    return pointer, first, count, own, number


@triton.jit(do_not_specialize=["end0", "end1", "end2", "tokens", "rank", "low_width"])
def _add_products(
    out, low, b0, b1, b2, b3, first0, first1, first2, first3, count0, count1, count2, count3,
    end0, end1, end2, tokens, rank, low_width, width,
    PIECE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, first, count, block, number = _linear(
        tl.program_id(1), b0, b1, b2, b3, first0, first1, first2, first3,
        count0, count1, count2, count3, end0, end1, end2,
    )  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    piece = tl.arange(0, PIECE)
    if EVEN:
        rank = tl.multiple_of(rank, PIECE)
        low_width = tl.multiple_of(low_width, PIECE)
    low += token.to(tl.int64)[:, None] * low_width + number * rank + piece[None, :]
    b += column[None, :] * rank + piece[:, None]
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for begin in range(0, rank, PIECE):
        within = piece < rank - begin
        known = (token < tokens)[:, None] & (within[None, :] | EVEN)
        x = tl.load(low + begin, mask=known, other=0.0)
        known = (column < count)[None, :] & (within[:, None] | EVEN)
        y = tl.load(b + begin, mask=known, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    out += token.to(tl.int64)[:, None] * width + first + column[None, :]
    inside = (token < tokens)[:, None] & (column < count)[None, :]
    total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "end0", "end1", "end2", "low_programs", "low_parts", "tokens", "rank", "low_width"
    ]
)  # fmt: skip
def _product_gradients(
    grad, low, grad_low, b0, b1, b2, b3, grad0, grad1, grad2, grad3,
    first0, first1, first2, first3, count0, count1, count2, count3,
    end0, end1, end2, low_programs, low_parts, tokens, rank, low_width, width, scaling,
    PIECE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if EVEN:
        rank = tl.multiple_of(rank, PIECE)
        low_width = tl.multiple_of(low_width, PIECE)
    pieces = tl.cdiv(rank, PIECE)
    if program < low_programs:
        part = program % low_parts
        number = part // pieces
        b, first, count, _, _ = _linear(
            number, b0, b1, b2, b3, first0, first1, first2, first3,
            count0, count1, count2, count3, 1, 2, 3,
        )  # fmt: skip
        _gradient_of_low(
            grad + first, b, grad_low + number * rank, program // low_parts, (part % pieces) * PIECE,
            count, tokens, rank, low_width, width, scaling,
            PIECE, EVEN, PRECISION, BLOCK, ACROSS,
        )  # fmt: skip
    else:
        program -= low_programs
        found, first, count, block, number = _linear(
            program // pieces, grad0, grad1, grad2, grad3, first0, first1, first2, first3,
            count0, count1, count2, count3, end0, end1, end2,
        )  # fmt: skip
        _gradient_of_b(
            grad + first, low + number * rank, found, block, (program % pieces) * PIECE,
            count, tokens, rank, low_width, width,
            PIECE, EVEN, PRECISION, BLOCK, ACROSS,
        )  # fmt: skip


@triton.jit
def _gradient_of_low(
    grad, b, grad_low, block, begin, count, tokens, rank, low_width, width, scaling,
    PIECE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """``grad @ b * scaling`` for a block of tokens and the piece of the rank from ``begin`` on;
    ``grad`` and ``grad_low`` begin at the linear's own columns."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    piece = begin + tl.arange(0, PIECE)
    column = tl.arange(0, ACROSS)
    within = (piece < rank) | EVEN
    grad += token.to(tl.int64)[:, None] * width + column[None, :]
    b += column[:, None] * rank + piece[None, :]
    total = tl.zeros([BLOCK, PIECE], dtype=tl.float32)
    for start in range(0, count, ACROSS):
        known = column < count - start
        x = tl.load(grad, mask=(token < tokens)[:, None] & known[None, :], other=0.0)
        y = tl.load(b, mask=known[:, None] & within[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        grad += ACROSS
        b += ACROSS * rank
    grad_low += token.to(tl.int64)[:, None] * low_width + piece[None, :]
    inside = (token < tokens)[:, None] & within[None, :]
    tl.store(grad_low, (total * scaling).to(grad_low.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_b(
    grad, low, found, block, begin, count, tokens, rank, low_width, width,
    PIECE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """``grad.T @ low`` for ``BLOCK`` columns and a piece of the rank, over all tokens, ``ACROSS``
    at once: the tile is that of ``_gradient_of_low``, turned."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    piece = begin + tl.arange(0, PIECE)
    token = tl.arange(0, ACROSS)
    within = (piece < rank) | EVEN
    grad += token.to(tl.int64)[None, :] * width + column[:, None]
    low += token.to(tl.int64)[:, None] * low_width + piece[None, :]
    total = tl.zeros([BLOCK, PIECE], dtype=tl.float32)
    for start in range(0, tokens, ACROSS):
        known = token < tokens - start
        x = tl.load(grad, mask=(column < count)[:, None] & known[None, :], other=0.0)
        y = tl.load(low, mask=known[:, None] & within[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        grad += ACROSS * width.to(tl.int64)
        low += ACROSS * low_width
    found += column[:, None] * rank + piece[None, :]
    inside = (column < count)[:, None] & within[None, :]
    tl.store(found, total.to(found.dtype.element_ty), mask=inside)

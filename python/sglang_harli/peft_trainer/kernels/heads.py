"""Rotary embedding of queries and keys, with or without their heads' norms, forward and backward.

Queries and keys are read from the columns of the fused output of q, k and v and written beside
each other, token by token; values stay where they are. The backward writes one gradient of that
fused output, values included. A program has some heads of one token, both halves of each; so the
forward may write where it reads.

Rounded where torch's own operators round: the normed head, the first product, the sum. The rotary
table has each cosine and sine twice, once for each half of a head; the first is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch

_AT_ONCE = 1024  # values of a program; 4 warps hold 8 each


@dataclass(frozen=True)
class HeadNorms:
    """Weights ``[head_dim]`` of the norms of query and key heads, and their epsilon."""

    query: Tensor
    key: Tensor
    epsilon: float


@dataclass(frozen=True)
class HeadLayout:
    """``queries`` and ``keys`` (key-value heads) of ``size`` values lie side by side in a token's
    fused output: queries, keys, values."""

    queries: int
    keys: int
    size: int

    @property
    def width(self) -> int:
        return (self.queries + 2 * self.keys) * self.size

    def blocks(self) -> tuple[int, int]:
        """(heads of a program, values of half a head), powers of 2."""
        half = triton.next_power_of_2(self.size // 2)
        return max(1, min(_AT_ONCE // (2 * half), triton.next_power_of_2(self.queries))), half


def rotate(
    flat: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: HeadLayout,
    norms: HeadNorms | None,
    out: Tensor | None = None,
) -> Tensor:
    """Queries and keys, normed and rotated: ``[rows, width, queries + keys, size]``.

    Args:
        flat: ``[rows * width, layout.width]``, contiguous.
        cos, sin: ``[1, width, size]``, contiguous: of the positions of every row.
        out: where they go, of that shape and contiguous, or ``flat`` itself.
    """
    width, heads = cos.shape[1], layout.queries + layout.keys
    if out is None:
        out = flat.new_empty(len(flat) // width, width, heads, layout.size)
    block, half = layout.blocks()
    launch(
        _rotate,
        (len(flat), triton.cdiv(layout.queries, block) + triton.cdiv(layout.keys, block)),
        flat,
        cos,
        sin,
        flat if norms is None else norms.query,
        flat if norms is None else norms.key,
        out,
        0.0 if norms is None else norms.epsilon,
        width,
        QUERIES=layout.queries,
        KEYS=layout.keys,
        SIZE=layout.size,
        WIDTH=layout.width,
        OUT_WIDTH=layout.width if out is flat else heads * layout.size,
        NORMED=norms is not None,
        BLOCK_HEADS=block,
        BLOCK_HALF=half,
        num_warps=4,
    )
    return out


def rotate_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flat: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: HeadLayout,
    norms: HeadNorms | None,
) -> Tensor:
    """The gradient of ``flat``, ``[rows * width, layout.width]``.

    Args:
        query, key, value: gradients, ``[rows, width, heads, size]`` each; copied where query's is
            not contiguous, or key's and value's are not laid out alike in whole heads.
        flat, cos, sin: as for ``rotate``; without norms ``flat`` is not read and may be empty.
    """
    rows, width = query.shape[:2]
    out = query.new_empty(rows * width, layout.width)
    strides = _in_heads(key, layout.size)
    if strides is None or strides != _in_heads(value, layout.size) or key.dtype != value.dtype:
        key, value = key.contiguous(), value.contiguous()
        strides = _in_heads(key, layout.size)
    assert strides is not None
    block, half = layout.blocks()
    launch(
        _rotate_back,
        (rows * width, triton.cdiv(layout.queries, block) + 2 * triton.cdiv(layout.keys, block)),
        query.contiguous(),
        key,
        value,
        *strides,
        flat,
        cos,
        sin,
        flat if norms is None else norms.query,
        flat if norms is None else norms.key,
        out,
        0.0 if norms is None else norms.epsilon,
        width,
        QUERIES=layout.queries,
        KEYS=layout.keys,
        SIZE=layout.size,
        WIDTH=layout.width,
        NORMED=norms is not None,
        BLOCK_HEADS=block,
        BLOCK_HALF=half,
        num_warps=4,
    )
    return out


def _in_heads(x: Tensor, size: int) -> tuple[int, int, int] | None:
    """Strides of rows, tokens and heads of ``[rows, width, heads, size]``, in heads; None: no whole
    numbers of them."""
    row, token, head, one = x.stride()
    if one != 1 or row % size or token % size or head % size:
        return None
    return row // size, token // size, head // size


@triton.jit(do_not_specialize=["width"])
def _rotate(
    flat, cos, sin, query_weight, key_weight, out, epsilon, width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr, NORMED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (QUERIES + BLOCK_HEADS - 1) // BLOCK_HEADS
    flat += token.to(tl.int64) * WIDTH
    out += token.to(tl.int64) * OUT_WIDTH
    angle = (token % width) * SIZE
    cos += angle
    sin += angle
    if part < query_parts:
        _rotate_some(
            flat, cos, sin, query_weight, out, epsilon, part, QUERIES, SIZE, NORMED, BLOCK_HEADS, BLOCK_HALF
        )
    else:
        flat += QUERIES * SIZE
        out += QUERIES * SIZE
        part -= query_parts
        _rotate_some(
            flat, cos, sin, key_weight, out, epsilon, part, KEYS, SIZE, NORMED, BLOCK_HEADS, BLOCK_HALF
        )


@triton.jit
def _rotate_some(
    flat, cos, sin, weight, out, epsilon, part,
    HEADS: tl.constexpr, SIZE: tl.constexpr, NORMED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """``part``: which ``BLOCK_HEADS`` of all; ``flat`` and ``out``: a token's first head."""
    dtype = out.dtype.element_ty
    place = tl.arange(0, BLOCK_HALF)
    head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = (head < HEADS)[:, None] & (place < SIZE // 2)[None, :]
    at = head[:, None] * SIZE + place[None, :]
    low = tl.load(flat + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(flat + at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        factor = tl.rsqrt(square / SIZE + epsilon)[:, None]
        gain_low = tl.load(weight + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(weight + place + SIZE // 2, mask=place < SIZE // 2, other=0.0)
        low = (low * factor * gain_low).to(dtype).to(tl.float32)
        high = (high * factor * gain_high.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    c = tl.load(cos + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    turned_low = (low * c).to(dtype).to(tl.float32) - high * s
    turned_high = (high * c).to(dtype).to(tl.float32) + low * s
    tl.store(out + at, turned_low.to(dtype), mask=inside)
    tl.store(out + at + SIZE // 2, turned_high.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["row_heads", "token_heads", "head_heads", "width"])
def _rotate_back(
    query, key, value, row_heads, token_heads, head_heads, flat, cos, sin, query_weight, key_weight, out,
    epsilon, width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The three ``..._heads`` are strides of ``key`` and ``value``, in heads."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (QUERIES + BLOCK_HEADS - 1) // BLOCK_HEADS
    key_parts: tl.constexpr = (KEYS + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = (token // width).to(tl.int64)
    column = token % width
    flat += token.to(tl.int64) * WIDTH
    out += token.to(tl.int64) * WIDTH
    cos += column * SIZE
    sin += column * SIZE
    if part < query_parts:
        query += token.to(tl.int64) * QUERIES * SIZE
        _rotate_some_back(
            query, 1, flat, cos, sin, query_weight, out, epsilon, part,
            QUERIES, SIZE, NORMED, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    elif part < query_parts + key_parts:
        key += (row * row_heads + column * token_heads) * SIZE
        flat += QUERIES * SIZE
        out += QUERIES * SIZE
        part -= query_parts
        _rotate_some_back(
            key, head_heads, flat, cos, sin, key_weight, out, epsilon, part,
            KEYS, SIZE, NORMED, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    else:
        value += (row * row_heads + column * token_heads) * SIZE
        head = (part - query_parts - key_parts) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        place = tl.arange(0, 2 * BLOCK_HALF)
        inside = (head < KEYS)[:, None] & (place < SIZE)[None, :]
        found = tl.load(value + head[:, None] * head_heads * SIZE + place[None, :], mask=inside, other=0.0)
        there = out + (QUERIES + KEYS) * SIZE + head[:, None] * SIZE + place[None, :]
        tl.store(there, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_some_back(
    grad, grad_head, flat, cos, sin, weight, out, epsilon, part,
    HEADS: tl.constexpr, SIZE: tl.constexpr, NORMED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """As ``_rotate_some``; ``grad_head``: from one head of ``grad`` to the next, in heads."""
    dtype = out.dtype.element_ty
    place = tl.arange(0, BLOCK_HALF)
    head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = (head < HEADS)[:, None] & (place < SIZE // 2)[None, :]
    at = head[:, None] * SIZE + place[None, :]
    grad += head[:, None] * grad_head * SIZE + place[None, :]
    low = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(grad + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
    back_low = ((low * c).to(dtype).to(tl.float32) + high * s).to(dtype)
    back_high = ((high * c).to(dtype).to(tl.float32) - low * s).to(dtype)
    if NORMED:
        was_low = tl.load(flat + at, mask=inside, other=0.0).to(tl.float32)
        was_high = tl.load(flat + at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(was_low * was_low, 1) + tl.sum(was_high * was_high, 1)
        factor = tl.rsqrt(square / SIZE + epsilon)[:, None]
        gain_low = tl.load(weight + place, mask=place < SIZE // 2, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(weight + place + SIZE // 2, mask=place < SIZE // 2, other=0.0)
        wanted_low = back_low.to(tl.float32) * gain_low
        wanted_high = back_high.to(tl.float32) * gain_high.to(tl.float32)[None, :]
        was_low *= factor
        was_high *= factor
        along = tl.sum(wanted_low * was_low, 1, True) + tl.sum(wanted_high * was_high, 1, True)
        along /= SIZE
        back_low = ((wanted_low - was_low * along) * factor).to(dtype)
        back_high = ((wanted_high - was_high * along) * factor).to(dtype)
    tl.store(out + at, back_low, mask=inside)
    tl.store(out + at + SIZE // 2, back_high, mask=inside)

"""Cross-entropy of the head: losses, hits, and the logits turned into their gradient in place.

Two passes over the logits and no copy of them: the first finds the largest and the sum of the
exponentials, the second writes the gradient where the logit was. A program owns a row, so none
reads what another has written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch

BLOCK = 4096  # logits at once; 8 warps hold 16 each
_SUM_BLOCK = 1024


def cross_entropy(logits: Tensor, targets: Tensor, factor: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies, targets whose logit is the largest): device scalars, fp64.

    Args:
        logits: ``[tokens, vocabulary]``, each row contiguous; they become the gradient of the sum
            times ``factor``, in their dtype, unless that is None.
        targets: int32 or int64, a token each, contiguous.
        factor: a number, or a device scalar.
    """
    tokens, vocabulary = logits.shape
    by_row = logits.new_empty((2, tokens), dtype=torch.float32)
    sums = logits.new_empty(2, dtype=torch.float64)
    scale = factor if isinstance(factor, Tensor) else by_row
    launch(
        _rows,
        (tokens,),
        logits,
        targets,
        scale,
        by_row,
        by_row[1],
        1.0 if isinstance(factor, Tensor) or factor is None else float(factor),
        vocabulary,
        logits.stride(0),
        SCALED=isinstance(factor, Tensor),
        GRADIENT=factor is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    launch(_sums, (2,), by_row, sums, tokens, BLOCK=_SUM_BLOCK, num_warps=4)
    return sums[0], sums[1]


@triton.jit(do_not_specialize_on_alignment=["scale", "losses", "hits"])
def _rows(
    logits, targets, scale, losses, hits, factor, vocabulary, stride,
    SCALED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    wanted = tl.load(logits + target).to(tl.float32)
    places = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = 0.0
    for begin in range(0, vocabulary, BLOCK):
        at = begin + places
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing finite so far
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(x - base), 0)
        highest = higher
    tl.store(losses + row, tl.log(total) - (wanted - highest))
    tl.store(hits + row, (wanted == highest).to(tl.float32))
    if GRADIENT:
        if SCALED:
            factor = tl.load(scale).to(tl.float32)
        share = factor / total
        for begin in range(0, vocabulary, BLOCK):
            at = begin + places
            x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - highest) * share - tl.where(at == target, factor, 0.0)
            tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < vocabulary)


@triton.jit(do_not_specialize=["tokens"])
def _sums(by_row, sums, tokens, BLOCK: tl.constexpr):
    """Of losses (program 0) and hits (program 1), in one order always."""
    which = tl.program_id(0)
    by_row += which * tokens
    places = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for begin in range(0, tokens, BLOCK):
        at = begin + places
        total += tl.load(by_row + at, mask=at < tokens, other=0.0).to(tl.float64)
    tl.store(sums + which, tl.sum(total, 0))

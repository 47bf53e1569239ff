"""Attention in blocks of queries against torch's own kernel under autograd."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from sglang_harli.peft_trainer.layers.attention import BLOCK, LONG_BLOCK, SHORT, CausalAttention
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors
from support.trainer.trainer_oracle import one_thread

__all__ = ["one_thread"]  # a fixture


def by_kernel(
    attend: CausalAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The same by ``scaled_dot_product_attention``."""
    queries, keys, repeats = query.shape[2], key.shape[2], attend.repeats
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    gap = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = gap >= 0 if attend.window is None else (gap >= 0) & (gap < attend.window)
    mask = None if queries == keys and bool((seen == (gap >= 0)).all()) else seen
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=attend.scale
    )
    return out.transpose(1, 2).reshape(out.shape[0], queries, -1)


@pytest.mark.parametrize("window", [None, 5, BLOCK + 3, 2 * LONG_BLOCK])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (1, 1),
        (BLOCK, BLOCK),
        (2 * BLOCK + 1, 2 * BLOCK + 1),
        (SHORT + 9, SHORT + 9),
        (9, 200),
        (70, SHORT + 80),
    ],
)
def test_blocks_give_what_the_kernel_gives(queries: int, keys: int, repeats: int, window: int | None) -> None:
    torch.manual_seed(0)
    attend = CausalAttention(0.3, repeats, window)
    query = torch.randn(2, 2 * repeats, queries, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, keys, 4, dtype=torch.float64)
    grad = torch.randn(2, queries, 2 * repeats * 4, dtype=torch.float64)
    with torch.no_grad():
        trace = SavedTensors()
        expected = trace.run("sdpa", functools.partial(by_kernel, attend), query, key, value)
        grads = trace.pieces["sdpa"].backward(grad)
        torch.testing.assert_close(attend.forward(query, key, value, None), expected)
        trace = SavedTensors()
        torch.testing.assert_close(attend.forward(query, key, value, trace), expected)
        torch.testing.assert_close(attend.backward(grad, trace), grads)


def results(attend: CausalAttention, *inputs: torch.Tensor, kernel: bool) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, in fp64."""
    query, key, value, grad = inputs
    trace = SavedTensors()
    with torch.no_grad():
        if kernel:
            out = trace.run("sdpa", functools.partial(by_kernel, attend), query, key, value)
            return [x.double() for x in (out, *trace.pieces["sdpa"].backward(grad))]
        out = attend.forward(query, key, value, trace)
        return [x.double() for x in (out, *attend.backward(grad, trace))]


@pytest.mark.parametrize("width", [BLOCK + 9, SHORT + 50])  # shares are held, and computed again
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_large_scores_are_as_exact_as_in_the_kernel_that_serves(
    dtype: torch.dtype, width: int
) -> None:
    """Scores of some hundreds; before scaling they are larger than anything that fp16 holds."""
    torch.manual_seed(0)
    attend = CausalAttention(64**-0.5, 2, None)
    query, grad = torch.randn(2, 4, width, 64), torch.randn(2, width, 4 * 64)
    key, value = torch.randn(2, 2, 2, width, 64)
    bias = torch.zeros(64)
    bias[:4] = 160.0  # as of k_proj: a large part that all keys share
    inputs = [x.to(dtype) for x in (query + bias, key + bias, value, grad)]
    assert (inputs[0].double() @ inputs[1].double().repeat_interleave(2, 1).mT).min() > 65504
    exact = results(attend, *(x.double() for x in inputs), kernel=True)
    served = results(attend, *inputs, kernel=True)
    found = results(attend, *inputs, kernel=False)
    for name, mine, theirs, right in zip(("out", "query", "key", "value"), found, served, exact, strict=True):
        assert mine.isfinite().all(), name
        assert (mine - right).norm() <= 1.5 * (theirs - right).norm() + 1e-3 * right.norm(), name

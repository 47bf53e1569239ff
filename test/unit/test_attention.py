"""Attention in blocks of queries against torch's own kernel under autograd, which other devices use."""

from __future__ import annotations

import pytest
import torch
from trainer_oracle import one_thread

from sglang_harli.peft_trainer.attention import BLOCK, LONG_BLOCK, SHORT, CausalAttention
from sglang_harli.peft_trainer.trace import Trace

__all__ = ["one_thread"]  # a fixture


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
        trace = Trace()
        expected = trace.run("sdpa", attend._sdpa, query, key, value)
        grads = trace.pieces["sdpa"].backward(grad)
        torch.testing.assert_close(attend.forward(query, key, value, None), expected)
        trace = Trace()
        torch.testing.assert_close(attend.forward(query, key, value, trace), expected)
        torch.testing.assert_close(attend.backward(grad, trace), grads)

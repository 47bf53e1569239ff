"""Causal attention for training: torch's sdpa, and on a CPU plain products for the backward of short rows.

torch's flash kernel works in blocks there that short rows do not fill: forward and backward of 4 rows
of 64 tokens (8 heads of 64, bf16, one core) take 8 ms against 1.3 ms, of 128 tokens 23 against 4; at
256 tokens they are even.  Its forward alone is always the faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # tokens; from about 256 on the kernel is as fast, and whole scores would cost memory


class CausalAttention:
    """Attention of one model's layers over rows that start at position 0.

    Args:
        scale: factor on the scores.
        repeats: query heads for each key-value head.
        window: tokens that a position attends to, itself included; None: all before it.
    """

    def __init__(self, scale: float, repeats: int, window: int | None) -> None:
        self.scale, self.repeats, self.window = scale, repeats, window
        self._hidden: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[rows, heads, width, head_dim]`` each (keys and values with fewer heads); so is the result."""
        width = query.shape[2]
        if query.device.type == "cpu" and width <= SHORT and torch.is_grad_enabled():
            return _ShortAttention.apply(query, key, value, self._hidden_upto(width), self.scale)  # type: ignore[no-any-return]
        if self.window is None or width <= self.window:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=self.repeats > 1
            )
        if self.repeats > 1:  # with a mask sdpa has no kernel for grouped queries
            key, value = key.repeat_interleave(self.repeats, 1), value.repeat_interleave(self.repeats, 1)
        seen = ~_hidden_places(width, self.window, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)

    def _hidden_upto(self, width: int) -> Tensor:
        if self._hidden is None:
            self._hidden = _hidden_places(SHORT, self.window, torch.device("cpu"))
        return self._hidden[:width, :width]


def _hidden_places(width: int, window: int | None, device: torch.device) -> Tensor:
    """bool ``[width, width]``: True where a query (row) must not see a key (column)."""
    place = torch.arange(width, device=device)
    gap = place[:, None] - place[None, :]
    return gap < 0 if window is None else (gap < 0) | (gap >= window)


class _ShortAttention(torch.autograd.Function):
    """Scores held whole, softmax in fp32 (fp64 for fp64); query heads of one key-value head in one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
        rows, heads, width, size = query.shape
        grouped = query.reshape(rows, key.shape[1], -1, size)  # the heads of a group one below the other
        scores = torch.matmul(grouped, key.transpose(-1, -2)).view(rows, heads, width, width)
        scores = scores.to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
        share = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        weights = share.to(query.dtype)
        ctx.save_for_backward(grouped, key, value, weights)
        ctx.scale = scale
        return torch.matmul(weights.view(rows, key.shape[1], -1, width), value).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grouped, key, value, weights = ctx.saved_tensors
        shape = grads[0].shape
        grad = grads[0].reshape(grouped.shape)
        flat = weights.view(*grad.shape[:-1], -1)
        grad_value = torch.matmul(flat.transpose(-1, -2), grad)
        exact = torch.promote_types(grad.dtype, torch.float32)
        # of the scores: share * (incoming - its mean under share), as softmax's derivative is
        incoming = torch.matmul(grad, value.transpose(-1, -2)).to(exact)
        share = flat.to(exact)
        mean = (incoming * share).sum(-1, keepdim=True)
        scores = incoming.sub_(mean).mul_(share).mul_(ctx.scale).to(grad.dtype)
        grad_query = torch.matmul(scores, key).view(shape)
        grad_key = torch.matmul(scores.transpose(-1, -2), grouped)
        return grad_query, grad_key, grad_value, None, None

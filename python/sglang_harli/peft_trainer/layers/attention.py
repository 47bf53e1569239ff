"""Causal attention for training, forward and backward; queries may be the last of a row's tokens.

In plain products over blocks of queries: on a CPU torch's flash kernel fills its own blocks poorly
(`benchmark/bench_step.py`). The shares are held for the backward while rows are short, otherwise
computed again from their logarithmic sums. A device has kernels (`operators.device_attention`).

In 16 bits scores and their gradients are those of sdpa, which serves: scaled and summed in fp32, so
that large ones are neither rounded to a few digits nor, in fp16, infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors

SHORT = 256  # tokens of a row up to which its shares are held
BLOCK, LONG_BLOCK = 64, 128  # queries at once, where the row is short and where not


class CausalAttention:
    """Attention of one model's layers over rows that start at position 0.

    Args:
        scale: factor on the scores; repeats: query heads for each key-value head.
        window: tokens that a position attends to, itself included; None: all before it.
    """

    def __init__(self, scale: float, repeats: int, window: int | None) -> None:
        self.scale, self.repeats, self.window = scale, repeats, window

    def forward(self, query: Tensor, key: Tensor, value: Tensor, trace: SavedTensors | None) -> Tensor:
        """``[rows, queries, heads * head_dim]``; ``trace`` remembers what ``backward`` needs.

        Args:
            query: ``[rows, heads, queries, head_dim]``, contiguous; the keys' last positions.
            key, value: ``[rows, key-value heads, keys, head_dim]``.
        """
        rows, heads, queries, size = query.shape
        out = query.new_empty(rows, queries, heads, size)
        key, value = key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:])
        exact = _exact(key)
        short = key.shape[1] <= SHORT
        shares, sums = [], []
        for span, seen in self._spans(queries, key.shape[1]):
            scores = self._scores(_grouped(query[:, :, span], len(key)), exact[:, seen], span, seen)
            if short or trace is None:
                share = scores.softmax(-1).to(query.dtype)
                shares.append(share.view(-1))
            else:
                highest = scores.amax(-1, keepdim=True)
                total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
                share = scores.div_(total).to(query.dtype)
                sums.append(total.log_().add_(highest).view(rows, heads, -1))
            part = torch.bmm(share.view(len(key), -1, share.shape[-1]), value[:, seen])
            out[:, span].copy_(part.view(rows, heads, -1, size).transpose(1, 2))
        out = out.view(rows, queries, -1)
        if trace is not None:
            trace["query"], trace["key"], trace["value"], trace["attended"] = query, key, value, out
            trace["shares" if short else "sums"] = torch.cat(shares) if short else torch.cat(sums, -1)
        return out

    def backward(self, grad: Tensor, trace: SavedTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, in their shapes; the latter two may have the exact
        dtype. ``grad``: ``[rows, queries, heads * head_dim]``."""
        query, key, value = trace["query"], trace["key"], trace["value"]
        rows, heads, queries, size = query.shape
        by_head = (rows, queries, heads, size)
        along = torch.linalg.vecdot(_exact(grad.view(by_head)), _exact(trace["attended"].view(by_head)))
        along = along.transpose(1, 2).unsqueeze(-1)  # [rows, heads, queries, 1]
        grad_heads = grad.view(by_head).transpose(1, 2)
        grad_query = torch.empty_like(query)
        grad_key = grad_value = None
        begin = 0
        spans = list(self._spans(queries, key.shape[1]))
        exact_value, exact_key = _exact(value), None if "shares" in trace else _exact(key)
        if len(spans) > 1 or spans[0][1].start:
            grad_key, grad_value = (torch.zeros_like(x, dtype=exact_value.dtype) for x in (key, value))
        for span, seen in spans:
            asked, incoming = (
                _grouped(query[:, :, span], len(key)),
                _grouped(grad_heads[:, :, span], len(key)),
            )
            keys = seen.stop - seen.start
            if "shares" in trace:
                share = trace["shares"].narrow(0, begin, asked.shape[0] * asked.shape[1] * keys)
                share = share.view(len(key), -1, keys)
                begin += share.numel()
            else:
                assert exact_key is not None
                scores = self._scores(asked, exact_key[:, seen], span, seen)
                known = _grouped(trace["sums"][:, :, span, None], len(key))
                share = scores.sub_(known).exp_().to(query.dtype)
            part_value = torch.bmm(share.transpose(1, 2), incoming)
            scores = torch.bmm(_exact(incoming), exact_value[:, seen].transpose(1, 2))
            scores.sub_(_grouped(along[:, :, span], len(key))).mul_(share).mul_(self.scale)
            low = scores.to(query.dtype)
            part = torch.bmm(low, key[:, seen])
            grad_query[:, :, span].copy_(part.view(rows, heads, -1, size))
            part_key = torch.bmm(low.transpose(1, 2), asked)
            if grad_key is None or grad_value is None:
                grad_key, grad_value = part_key, part_value
            else:
                grad_key[:, seen].add_(part_key)
                grad_value[:, seen].add_(part_value)
        assert grad_key is not None and grad_value is not None
        shape = (rows, -1, *key.shape[1:])
        return grad_query, grad_key.view(shape), grad_value.view(shape)

    def _spans(self, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
        """(queries, the keys that some of them see), block by block."""
        block, before = BLOCK if keys <= SHORT else LONG_BLOCK, keys - queries
        for begin in range(0, queries, block):
            end = min(begin + block, queries)
            first = 0 if self.window is None else max(0, before + begin - self.window + 1)
            yield slice(begin, end), slice(first, before + end)

    def _scores(self, query: Tensor, key: Tensor, span: slice, seen: slice) -> Tensor:
        """Scaled scores ``[groups, repeats * queries, keys]`` of a span, -inf where a key is not
        seen. ``key``: in the exact dtype, which the scores have too."""
        queries, keys = span.stop - span.start, seen.stop - seen.start
        scores = torch.bmm(_exact(query) * self.scale, key.transpose(1, 2))
        by_query = scores.view(-1, queries, keys)
        by_query[:, :, keys - queries :].add_(_later(scores.dtype, scores.device)[:queries, :queries])
        if self.window is not None and keys > self.window:
            gap = _gaps(queries, keys, query.device)
            by_query.masked_fill_(gap >= self.window, -torch.inf)
        return scores


@functools.cache
def _later(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[LONG_BLOCK, LONG_BLOCK]``: -inf where a key (column) lies behind a query (row)."""
    return torch.full((LONG_BLOCK, LONG_BLOCK), -torch.inf, dtype=dtype, device=device).triu_(1)


def _exact(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """``[rows, heads, n, x]`` as ``[groups, heads / key-value heads * n, x]``."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _gaps(queries: int, keys: int, device: torch.device) -> Tensor:
    """``[queries, keys]``: how far each key (column) lies before each query, the last ones."""
    place = torch.arange(keys, device=device)
    return place[keys - queries :, None] - place[None]

"""torch's attention and norm kernels of a CUDA device in plain arithmetic, on CPU tensors.

What each is to do is aten's: ``[rows, tokens, heads, head_dim]``, grouped queries, causal with the
last query on the last key, ``window_size_left`` tokens before itself. A call that a device would
refuse fails here too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import _fused_rms_norm_backward
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ReferenceKernels(TorchDispatchMode):
    """While it is entered; ``calls``: how often each of them was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = KERNELS.get(func.overloadpacket)
        if own is None:
            return func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return own(*args, **(kwargs or {}))


def flash_forward(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, mask, *, scale, window_size_left=None
):
    assert cum_q is None and cum_k is None and dropout == 0.0 and causal and not mask
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    for heads in (query, key, value):
        assert heads.stride(-1) == 1 and heads.shape[-1] % 8 == 0
    out, sums = _forward(query, key, value, scale, window_size_left)
    state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, sums, *state, query.new_empty(0)


def flash_backward(
    grad, query, key, value, out, sums, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused,
    *, scale, window_size_left=None,
):  # fmt: skip
    assert cum_q is None and cum_k is None and dropout == 0.0 and causal
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    assert grad.shape == out.shape and out.stride(-1) == 1 and state.dtype == unused.dtype == torch.uint64
    return _backward(grad, query, key, value, out, sums, scale, window_size_left)


def efficient_forward(
    query, key, value, bias, cum_q, cum_k, max_q, max_k, dropout, kind, sums_wanted=False, *, scale
):
    assert bias is cum_q is cum_k is max_q is max_k is None and dropout == 0.0 and kind == 2
    assert query.shape[2] == key.shape[2] == value.shape[2]  # no grouped queries
    out, sums = _forward(query, key, value, scale, None)
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 32))
    kept = sums if sums_wanted else sums[..., :0]
    return out, kept, torch.zeros(()).long(), torch.zeros(()).long(), query.shape[1], key.shape[1]


def efficient_backward(
    grad, query, key, value, bias, out, cum_q, cum_k, max_q, max_k, sums, dropout, seed, offset, kind,
    bias_wanted, *, scale,
):  # fmt: skip
    assert bias is cum_q is cum_k is None and dropout == 0.0 and kind == 2 and not bias_wanted
    found = _backward(grad, query, key, value, out, sums[..., : query.shape[1]], scale, None)
    return *found, torch.empty(())


KERNELS: dict[Any, Any] = {
    aten._flash_attention_forward: flash_forward,
    aten._flash_attention_backward: flash_backward,
    aten._efficient_attention_forward: efficient_forward,
    aten._efficient_attention_backward: efficient_backward,
    aten._fused_rms_norm_backward: _fused_rms_norm_backward,
}


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(query: Tensor, key: Tensor, scale: float, left: int | None) -> Tensor:
    """``[rows, heads, queries, keys]``; ``key``: one head for each of the query's."""
    scores = torch.einsum("bqhd,bkhd->bhqk", _exact(query), _exact(key)) * scale
    gap = torch.arange(key.shape[1] - query.shape[1], key.shape[1])[:, None] - torch.arange(key.shape[1])
    hidden = gap < 0 if left is None else (gap < 0) | (gap > left)
    return scores.masked_fill(hidden, -torch.inf)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, left: int | None
) -> tuple[Tensor, Tensor]:
    repeats = query.shape[2] // key.shape[2]
    scores = _scores(query, key.repeat_interleave(repeats, 2), scale, left)
    wide = _exact(value.repeat_interleave(repeats, 2))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), wide)
    return out.to(query.dtype).contiguous(), scores.logsumexp(-1)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float,
    left: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    repeats = query.shape[2] // key.shape[2]
    wide_key, wide_value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    share = (_scores(query, wide_key, scale, left) - sums.unsqueeze(-1)).exp()
    grad = _exact(grad)
    along = (grad * _exact(out)).sum(-1).transpose(1, 2).unsqueeze(-1)
    low = torch.einsum("bqhd,bkhd->bhqk", grad, _exact(wide_value)).sub(along) * share * scale
    found = [
        torch.einsum("bhqk,bkhd->bqhd", low, _exact(wide_key)),
        torch.einsum("bhqk,bqhd->bkhd", low, _exact(query)),
        torch.einsum("bhqk,bqhd->bkhd", share, grad),
    ]
    found[1:] = [x.unflatten(2, (-1, repeats)).sum(3) for x in found[1:]]
    query_grad, key_grad, value_grad = (x.to(query.dtype).contiguous() for x in found)
    return query_grad, key_grad, value_grad

"""Causal attention on a device by one named kernel of torch's, forward and backward.

torch's own choice (``scaled_dot_product_attention``) may be cuDNN, which builds a plan for each new
shape on the host; here every micro-batch has new shapes. So the kernel is called by name:

    flash       16 bits, heads of a multiple of 8 up to 256: grouped queries, windows, last queries of a row
    efficient   fp32, and other heads, without a window: keys and values are repeated for grouped queries
    products    what is left (``attention``)

Heads lie as ``[rows, width, heads, head_dim]``, as both kernels have it: nothing is copied. That
queries are the last of the keys is the kernels' own meaning of causal (aten's
``_flash_attention_forward``, and ``custom_mask_type`` 2 of ``_efficient_attention_forward``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.peft_trainer.layers.attention import CausalAttention
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors

_FROM_BOTTOM_RIGHT = 2  # custom_mask_type: causal, the last query sees the last key
_LARGEST_HEAD = 256


def flash_serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernel takes such heads, both ways."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD


def efficient_serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's memory-efficient kernel does: its loads want heads of a multiple of 8 (fp32:
    of 4) values."""
    step = 4 if dtype == torch.float32 else 8
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and head_dim % step == 0


class DeviceAttention(CausalAttention):
    """Attention by a device's kernels; heads ``[rows, heads, tokens, head_dim]`` are views of
    token-major memory. ``flash``: whether the device has the flash kernel."""

    def __init__(self, scale: float, repeats: int, window: int | None, *, flash: bool) -> None:
        super().__init__(scale, repeats, window)
        self.flash = flash

    def forward(self, query: Tensor, key: Tensor, value: Tensor, trace: SavedTensors | None) -> Tensor:
        if self.flash and flash_serves(query.dtype, query.shape[-1]):
            return self._flash(query, key, value, trace)
        if efficient_serves(query.dtype, query.shape[-1]) and not self._cuts(key.shape[2]):
            return self._efficient(query, key, value, trace)
        return super().forward(query, key, value, trace)

    def backward(self, grad: Tensor, trace: SavedTensors) -> tuple[Tensor, Tensor, Tensor]:
        if "flash" in trace:
            return self._flash_backward(grad, trace)
        if "efficient" in trace:
            return self._efficient_backward(grad, trace)
        return super().backward(grad, trace)

    def _cuts(self, keys: int) -> bool:
        """Whether the window hides any of so many keys."""
        return self.window is not None and keys > self.window

    def _left(self, keys: int) -> int | None:
        """Tokens before itself that a query sees; None: all."""
        assert self.window is None or self.window > 0
        return self.window - 1 if self.window is not None and self._cuts(keys) else None

    # ---- flash
    def _flash(self, query: Tensor, key: Tensor, value: Tensor, trace: SavedTensors | None) -> Tensor:
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        queries, keys = query.shape[2], key.shape[2]
        out, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            *heads,
            None,
            None,
            queries,
            keys,
            0.0,
            True,
            False,
            scale=self.scale,
            window_size_left=self._left(keys),
        )
        if trace is not None:
            trace["query"], trace["key"], trace["value"] = heads
            trace["attended"], trace["sums"] = out, sums
            trace["flash"], trace["unused"] = state, unused
        return out.reshape(len(out), queries, -1)

    def _flash_backward(self, grad: Tensor, trace: SavedTensors) -> tuple[Tensor, Tensor, Tensor]:
        out, key = trace["attended"], trace["key"]
        queries, keys = out.shape[1], key.shape[1]
        grads = torch.ops.aten._flash_attention_backward(
            grad.view(out.shape),
            trace["query"],
            key,
            trace["value"],
            out,
            trace["sums"],
            None,
            None,
            queries,
            keys,
            0.0,
            True,
            trace["flash"],
            trace["unused"],
            scale=self.scale,
            window_size_left=self._left(keys),
        )
        query, key, value = (x.transpose(1, 2) for x in grads)
        return query, key, value

    # ---- memory-efficient
    def _efficient(self, query: Tensor, key: Tensor, value: Tensor, trace: SavedTensors | None) -> Tensor:
        query, key, value = query.transpose(1, 2), self._repeated(key), self._repeated(value)
        out, sums, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            query,
            key,
            value,
            None,
            None,
            None,
            None,
            None,
            0.0,
            _FROM_BOTTOM_RIGHT,
            trace is not None,
            scale=self.scale,
        )
        if trace is not None:
            trace["query"], trace["key"], trace["value"] = query, key, value
            trace["attended"], trace["sums"] = out, sums
            trace["efficient"], trace["unused"] = seed, offset
        return out.reshape(len(out), out.shape[1], -1)

    def _efficient_backward(self, grad: Tensor, trace: SavedTensors) -> tuple[Tensor, Tensor, Tensor]:
        out, key = trace["attended"], trace["key"]
        query, key, value, _ = torch.ops.aten._efficient_attention_backward(
            grad.view(out.shape),
            trace["query"],
            key,
            trace["value"],
            None,
            out,
            None,
            None,
            out.shape[1],
            key.shape[1],
            trace["sums"],
            0.0,
            trace["efficient"],
            trace["unused"],
            _FROM_BOTTOM_RIGHT,
            False,
            scale=self.scale,
        )
        return query.transpose(1, 2), self._summed(key), self._summed(value)

    def _repeated(self, heads: Tensor) -> Tensor:
        """Key-value heads, once for each query head: ``[rows, tokens, heads, head_dim]``."""
        heads = heads.transpose(1, 2)
        return heads if self.repeats == 1 else heads.repeat_interleave(self.repeats, 2)

    def _summed(self, grad: Tensor) -> Tensor:
        """The gradient of what was repeated, ``[rows, key-value heads, tokens, head_dim]``."""
        if self.repeats > 1:
            grad = grad.unflatten(2, (-1, self.repeats)).sum(3)
        return grad.transpose(1, 2)

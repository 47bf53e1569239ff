"""Cosines and sines of positions 0, 1, 2 ...: transformers' own, or the table SGLang serves with.

Bound to SGLang nothing is computed anew: whatever it made of a config (YaRN, another base, a factor
that transformers does not know), training rotates by the same numbers. Of SGLang's rotary
embeddings this file knows ``cos_sin_cache``: ``[positions, rotary size]``, cosines in the first
half of a row and sines in the second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sglang_harli.errors import TrainingError

RotaryTable = tuple[Tensor, Tensor]  # (cos, sin), each [1, positions, head_dim]


class ServedRotary(nn.Module):
    """A served rotary embedding as transformers calls its own; ``dtype``: of the model. SGLang may
    replace its module's table, so that is read when it is needed."""

    def __init__(self, served: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._served = (served,)  # not a submodule of this one
        self.dtype = dtype

    @property
    def cache(self) -> Tensor:
        return self._served[0].cos_sin_cache  # type: ignore[return-value]

    def table(self, length: int) -> RotaryTable:
        """Of the first positions; as SGLang's in the model's dtype on a CPU, else the table's."""
        rows = self.cache[:length]
        if rows.device.type == "cpu":
            rows = rows.to(self.dtype)
        cos, sin = rows.chunk(2, dim=-1)
        return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]

    def forward(self, x: Tensor, position_ids: Tensor) -> RotaryTable:
        cos, sin = self.table(len(self.cache))
        return cos[0][position_ids].to(x.dtype), sin[0][position_ids].to(x.dtype)


def model_table(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[int], RotaryTable]:
    """The table that transformers' module computes."""
    like = torch.empty(0, dtype=dtype, device=device)

    def table(length: int) -> RotaryTable:
        return module(like, torch.arange(length, device=device)[None])

    return table


class Rotary:
    """The table of one run, as far as it was needed; ``positions``: its end; None: without end."""

    def __init__(self, table: Callable[[int], RotaryTable], positions: int | None) -> None:
        self._make, self._positions = table, positions
        self._table: RotaryTable | None = None

    def upto(self, width: int) -> RotaryTable:
        """(cos, sin), each ``[1, width, head_dim]``.

        Raises:
            TrainingError: ``row_too_long``: the served model has fewer positions.
        """
        table = self._table
        if table is None or table[0].shape[1] < width:
            length = 1 << (width - 1).bit_length()
            if self._positions is not None:
                if width > self._positions:
                    raise TrainingError(
                        f"a row of {width} tokens: the served model has {self._positions} positions",
                        code="row_too_long",
                    )
                length = min(length, self._positions)
            table = self._table = self._make(length)
        cos, sin = table
        return cos[:, :width], sin[:, :width]


def rotated(x: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotary embedding of ``[rows, width, heads, size]`` as ``[rows, heads, width, size]``."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    rows, width, heads, size = x.shape
    out = x.new_empty(rows, heads, width, size)
    view, half = out.transpose(1, 2), size // 2
    torch.mul(x, cos, out=view)
    view[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    view[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rotated_back(grad: Tensor, rotary: RotaryTable, out: Tensor) -> None:
    """The gradient at ``rotated``'s input, into ``out``, from that at its output."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    grad, half = grad.transpose(1, 2), grad.shape[-1] // 2
    if grad.dtype == out.dtype:
        torch.mul(grad, cos, out=out)
    else:
        out.copy_(grad * cos)
    out[..., half:].addcmul_(grad[..., :half].to(out.dtype), sin[..., :half], value=-1)
    out[..., :half].addcmul_(grad[..., half:].to(out.dtype), sin[..., half:])

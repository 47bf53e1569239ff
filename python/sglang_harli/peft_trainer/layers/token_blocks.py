"""One row of one layer in blocks of tokens, for rows that are too long for one quantum.

forward    block after block from the row's beginning; each adds its keys and values for those that follow
backward   the row's keys and values again, then block after block from its end: the gradients of a block's own keys
           and values are whole when all blocks behind it, which alone attend to them, are done
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sglang_harli.core import QuantumKind


@dataclass(slots=True)
class RowKeys:
    """Keys, values and their gradients of a row in one layer; ``at``: tokens of the block at hand.
    Each ``[1, key-value heads, length, head_dim]``."""

    key: Tensor
    value: Tensor
    grad_key: Tensor
    grad_value: Tensor
    at: slice = field(default_factory=lambda: slice(0, 0))

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens up to the end of the block, whose own these are."""
        self.key[:, :, self.at].copy_(key)
        self.value[:, :, self.at].copy_(value)
        return self.key[:, :, : self.at.stop], self.value[:, :, : self.at.stop]

    def completed(self, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the block's own; given: what the block adds for all tokens up to its end."""
        self.grad_key[:, :, : self.at.stop].add_(grad_key)
        self.grad_value[:, :, : self.at.stop].add_(grad_value)
        return self.grad_key[:, :, self.at], self.grad_value[:, :, self.at]


class RowBlocks:
    """Where a row that is taken in blocks stands; ``row``: within the micro-batch."""

    def __init__(self, row: int, length: int, *, backward: bool) -> None:
        self.row, self.length, self.backward = row, length, backward
        self.keys: RowKeys | None = None  # from the first block on
        self._known = 0  # tokens whose keys and values are there
        self._end = length if backward else 0  # of the tokens whose backward is left

    @property
    def fills(self) -> bool:
        """The next quantum computes keys and values again, before the backward."""
        return self.backward and self._known < self.length

    @property
    def kind(self) -> QuantumKind:
        return QuantumKind.BACKWARD if self.backward and not self.fills else QuantumKind.FORWARD

    @property
    def left(self) -> int:
        """Tokens that the next quantum may take."""
        return self._end if self.kind == QuantumKind.BACKWARD else self.length - self._known

    @property
    def finished(self) -> bool:
        return self._known == self.length and not self._end

    def take(self, tokens: int) -> slice:
        """The next ``tokens`` of them, as many as are left at most."""
        if self.kind == QuantumKind.BACKWARD:
            block = slice(max(0, self._end - tokens), self._end)
            self._end = block.start
        else:
            block = slice(self._known, min(self._known + tokens, self.length))
            self._known = block.stop
        return block

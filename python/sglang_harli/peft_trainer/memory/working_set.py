"""What a quantum takes from torch's allocator beside its leases, and how many rows that allows.

The bound follows from the sizes of a layer's linears: it adds up the tensors that are alive at once
where most are, with what torch's flash kernel takes for itself (key and value gradients of every
query head, the query's in fp32 with rows rounded to 128 tokens). A test measures the peak against
it. On a CPU there is no bound: its memory is not set apart.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase

_FLASH_ROWS = 128  # tokens to which the flash kernel rounds a row
_FLASH_HEAD = 32  # values to which it rounds a head
_RESERVED = 1.1  # of the allocator: blocks are rounded


class WorkingSet:
    """Of one layer and of the head, in bytes.  ``rank``: of the adapter, on all linears."""

    def __init__(self, base: FrozenBase, rank: int) -> None:
        sizes = base.linear_sizes()
        self.hidden, self.query = sizes["q_proj"]
        self.keys, self.intermediate = sizes["k_proj"][1], sizes["gate_proj"][1]
        self.low = 7 * rank
        self.bytes = base.dtype.itemsize
        self.exact = torch.promote_types(base.dtype, torch.float32).itemsize
        attention: Any = base.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.heads = self.query // self.head_dim
        self.normed_heads = getattr(attention, "q_norm", None) is not None
        linears = sizes.values()
        self.leaves = self.bytes * rank * sum(a + b for a, b in linears)  # gradients of the adapter

    def row_bytes(self, kind: QuantumKind, width: int, *, keeps: bool = False) -> int:
        """Of a row of ``width`` tokens in one layer; ``keeps``: what a forward leaves for the
        backward is alive too, until it is moved into its lease."""
        per_token = self.forward_token + (self.trace_token if keeps else 0)
        if kind is QuantumKind.BACKWARD:
            per_token = self.trace_token + self.backward_token
        elif kind is QuantumKind.BACKWARD_KEPT:
            per_token = self.backward_token
        flash = self._flash_bytes(width) if kind is not QuantumKind.FORWARD else 0
        return int(_RESERVED * (width * per_token + flash))

    def block_bytes(self, kind: QuantumKind, tokens: int, length: int) -> int:
        """Of a block of ``tokens`` that attends to a row of ``length``."""
        if kind is not QuantumKind.BACKWARD:
            return self.row_bytes(kind, tokens)
        over_keys = self.bytes * length * 2 * (self.query + self.keys)
        return self.row_bytes(kind, tokens) + int(_RESERVED * over_keys)

    def head_bytes(self, tokens: int) -> int:
        """Of so many target tokens; the logits lie in a lease."""
        return int(_RESERVED * tokens * (5 * self.hidden * self.bytes + 64))

    @property
    def _attended(self) -> int:
        """Elements of a token from the linears of q, k and v to attention's output."""
        normed = 2 * self.query + self.keys if self.normed_heads else 0
        return 3 * self.query + 3 * self.keys + normed

    @property
    def forward_token(self) -> int:
        attention = 3 * self.hidden + self._attended
        mlp = 4 * self.hidden + 3 * self.intermediate
        return self.bytes * (max(attention, mlp) + self.low) + 8 * self.heads

    @property
    def trace_token(self) -> int:
        """Of what a forward leaves for the backward."""
        saved = 4 * self.hidden + 3 * self.query + 3 * self.keys + 4 * self.intermediate + self.low
        return self.bytes * saved + 8 * self.heads

    @property
    def backward_token(self) -> int:
        mlp = 4 * self.hidden + 3 * self.intermediate
        heads = 4 * self.query + 6 * self.keys
        if self.normed_heads:
            heads += 3 * self.query + 2 * self.keys
        attention = 4 * self.hidden + 2 * self.query + heads
        return self.bytes * (max(mlp, attention) + self.low)

    def _flash_bytes(self, width: int) -> int:
        """What the flash kernel's backward takes for itself."""
        rounded = -(-width // _FLASH_ROWS) * _FLASH_ROWS
        size = -(-self.head_dim // _FLASH_HEAD) * _FLASH_HEAD
        exact = rounded * self.heads * (size * 4 + 4)
        return exact + self.bytes * width * 2 * self.query


class QuantumBound:
    """How much a quantum may take at once; ``nbytes`` None: no bound yet."""

    def __init__(self, needs: WorkingSet, nbytes: int | None) -> None:
        self.needs, self.nbytes = needs, nbytes

    def rows(self, kind: QuantumKind, width: int, offered: int, *, keeps: bool = False) -> int:
        """Of rows of ``width``, at most ``offered``; at least one."""
        return self._most(self.needs.leaves, self.needs.row_bytes(kind, width, keeps=keeps), offered)

    def blocks(self, kind: QuantumKind, tokens: int, length: int, offered: int) -> int:
        """Of blocks of ``tokens`` of one row, at most ``offered``; at least one."""
        one, two = (self.needs.block_bytes(kind, n * tokens, length) for n in (1, 2))
        return self._most(self.needs.leaves + 2 * one - two, two - one, offered)

    def head_tokens(self, offered: int) -> int:
        """Target tokens, at most ``offered``; at least one."""
        return self._most(0, self.needs.head_bytes(1024) // 1024, offered)

    def too_long(self, kind: QuantumKind, width: int) -> bool:
        """Whether one row takes more by itself."""
        return self.nbytes is not None and self.needs.leaves + self.needs.row_bytes(kind, width) > self.nbytes

    def halve(self, taken: int) -> None:
        """What takes so many bytes by the estimate had no room."""
        self.nbytes = max(1, (taken if self.nbytes is None else min(taken, self.nbytes)) // 2)

    def _most(self, fixed: int, each: int, offered: int) -> int:
        if self.nbytes is None:
            return offered
        return max(1, min(offered, (self.nbytes - fixed) // max(1, each)))

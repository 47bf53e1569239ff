"""A micro-batch's memory: saved layer inputs, the gradient, and the head's workspace, in one lease.

    saved[0]  saved[1]  ...  saved[L]     grad           each [rows, width, hidden]
    input of  input of       input of     of the output
    layer 0   layer 1        the head     of the layer below which backward stands

    logits [tokens, vocabulary], exact; for a 16-bit base ``low``, a copy in its dtype

Contents are undefined; each place is written before it is read (0 * NaN is NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.layers.token_blocks import RowKeys
from sglang_harli.peft_trainer.memory.heap import obtain
from sglang_harli.peft_trainer.memory.layout import logits_dtypes
from sglang_harli.peft_trainer.rows import Rows
from sglang_harli.train_memory import Lease, Specs, TrainMemory, carved_bytes

LEAST_HEAD_TOKENS = 64  # the logits tensor is cut no further


@dataclass(frozen=True, slots=True)
class Activations:
    """One micro-batch's tensors; ``low`` is ``logits`` where the dtypes agree. Of an evaluation
    ``saved`` is one tensor, and ``grad`` that same one."""

    saved: list[Tensor]
    grad: Tensor
    logits: Tensor
    low: Tensor


class MicroBatchMemory:
    """Holds the lease from one micro-batch to the next as long as it is large enough.

    Args:
        head_tokens: most target tokens whose logits are computed at once.
        cuts: fewer at once, where memory is free but not in pieces that are large enough.

    Attributes:
        head_tokens: most of them in the lease that is held.
    """

    def __init__(self, base: FrozenBase, memory: TrainMemory, head_tokens: int, *, cuts: bool = True) -> None:
        self._memory, self._dtype = memory, base.dtype
        self._exact = torch.promote_types(base.dtype, torch.float32)
        self._inputs = len(base.layers) + 1
        self._hidden = base.config.hidden_size
        self._vocabulary = base.model.lm_head.weight.shape[0]
        self._most_head_tokens = self.head_tokens = head_tokens
        self._cuts = cuts
        self._lease: Lease | None = None
        config, heads = base.config, base.config.num_attention_heads
        self._heads = config.num_key_value_heads, getattr(config, "head_dim", None) or self._hidden // heads
        self._keys_lease: Lease | None = None
        self._operators = base.operators

    def specs(self, rows: Rows) -> Specs:
        """What is carved, in this order: saved[0..L], grad, logits, and ``low`` if there is one.
        Of rows that are evaluated one tensor stands for all before the logits."""
        tokens = min(len(rows.targets), self.head_tokens)
        inputs = [((rows.count, rows.width, self._hidden), self._dtype)] * self._kept(rows)
        logits = [((tokens, self._vocabulary), dtype) for dtype in logits_dtypes(self._dtype)]
        return [*inputs, *logits]

    def _kept(self, rows: Rows) -> int:
        return 1 if rows.evaluated else self._inputs + 1

    def obtain(self, rows: Rows) -> int:
        """Hold a lease for a micro-batch; returns the bytes that are lacking now, 0: none."""
        if self._lease is not None:
            if self._lease.holds(self.specs(rows)):
                return 0
            self.give_back()  # first: both need not fit
        self.head_tokens = self._most_head_tokens
        specs = self.specs(rows)
        self._lease = obtain(self._memory, MemoryPurpose.MICRO_BATCH, specs)
        while self._lease is None and self._cut_head(rows):
            self._lease = obtain(self._memory, MemoryPurpose.MICRO_BATCH, self.specs(rows))
        return 0 if self._lease is not None else sum(carved_bytes(shape, dtype) for shape, dtype in specs)

    def _cut_head(self, rows: Rows) -> bool:
        """Ask for logits of half as many target tokens; whether that may help."""
        now = min(len(rows.targets), self.head_tokens)
        if not self._cuts or not self._memory.scattered or now <= LEAST_HEAD_TOKENS:
            return False
        self.head_tokens = max(now // 2, LEAST_HEAD_TOKENS)
        return True

    def carve(self, rows: Rows) -> Activations:
        """The tensors of the micro-batch that ``obtain`` was for; those before are gone."""
        assert self._lease is not None
        parts = self._lease.carve_all(self.specs(rows))
        inputs = self._kept(rows)
        return Activations(parts[: max(inputs - 1, 1)], parts[inputs - 1], parts[inputs], parts[-1])

    def _keys_specs(self, length: int) -> Specs:
        shape = (1, self._heads[0], length, self._heads[1])
        if self._operators.token_major:
            shape = (1, length, *self._heads)
        return [(shape, self._dtype), (shape, self._dtype), (shape, self._exact), (shape, self._exact)]

    def obtain_keys(self, length: int) -> bool:
        """Hold a lease for one row's keys and values (a layer in blocks); False: not now."""
        specs = self._keys_specs(length)
        if self._keys_lease is not None and not self._keys_lease.holds(specs):
            self._keys_lease.give_back()
            self._keys_lease = None
        if self._keys_lease is None:
            self._keys_lease = obtain(self._memory, MemoryPurpose.MICRO_BATCH, specs)
        return self._keys_lease is not None

    def carve_keys(self, length: int) -> RowKeys:
        """What ``obtain_keys`` was asked for; gradients are zero."""
        assert self._keys_lease is not None
        places = self._keys_lease.carve_all(self._keys_specs(length))
        self._operators.zero(places[2:])
        if self._operators.token_major:
            places = [place.transpose(1, 2) for place in places]
        key, value, grad_key, grad_value = places
        return RowKeys(key, value, grad_key, grad_value)

    def give_back(self) -> bool:
        """Whether there was something to give back."""
        leases = [lease for lease in (self._lease, self._keys_lease) if lease is not None]
        self._lease = self._keys_lease = None
        for lease in leases:
            lease.give_back()
        return bool(leases)

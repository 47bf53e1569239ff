"""The order of micro-batches over a whole run, computed on demand.

Each epoch is a permutation of the rows drawn from (seed, epoch), cut into micro-batches and
optimizer steps.  A step never spans two epochs.  Only one epoch's order is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence  # here: numpy loads it when it is first used

from sglang_harli.protocol.internal import BatchCursor
from sglang_harli.protocol.micro_batches import Padded, pad
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.data.token_store import TokenReader


def total_steps(rows: int, hp: Hyperparameters) -> int:
    """Optimizer steps of a run over ``rows`` rows."""
    return hp.n_epochs * _steps_per_epoch(rows, hp)


def _steps_per_epoch(rows: int, hp: Hyperparameters) -> int:
    return -(-_batches_per_epoch(rows, hp) // hp.gradient_accumulation_steps)


def _batches_per_epoch(rows: int, hp: Hyperparameters) -> int:
    return -(-rows // hp.batch_size)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch; the rows' positions are those within the optimizer step."""

    cursor: BatchCursor
    micro_batches: int
    step_target_tokens: int
    data: Padded


class BatchOrder:
    """The micro-batches of a job in the order in which they are trained."""

    def __init__(self, tokens: TokenReader, hp: Hyperparameters) -> None:
        self._tokens = tokens
        self._hp = hp
        self._rows = len(tokens)
        self._steps_per_epoch = _steps_per_epoch(self._rows, hp)
        self.total_steps = total_steps(self._rows, hp)
        self._order: tuple[int, np.ndarray] | None = None

    def cursor_after(self, step: int) -> BatchCursor:
        """The first micro-batch of the step after ``step`` (0: of the run)."""
        return BatchCursor(epoch=self._epoch(step + 1), step=step + 1, index=0)

    def following(self, cursor: BatchCursor) -> BatchCursor:
        """The micro-batch after ``cursor``."""
        if cursor.index + 1 < self.micro_batches(cursor.step):
            return BatchCursor(epoch=cursor.epoch, step=cursor.step, index=cursor.index + 1)
        return self.cursor_after(cursor.step)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of an optimizer step: the last one of an epoch may have fewer."""
        first = (step - 1) % self._steps_per_epoch * self._hp.gradient_accumulation_steps
        left = _batches_per_epoch(self._rows, self._hp) - first
        return min(left, self._hp.gradient_accumulation_steps)

    def batch(self, cursor: BatchCursor) -> Batch:
        """The micro-batch at ``cursor`` (1 <= step <= total_steps)."""
        step_rows = self._step_rows(cursor.step)
        start = cursor.index * self._hp.batch_size
        chosen = step_rows[start : start + self._hp.batch_size]
        parts = [self._tokens.row(int(row)) for row in chosen]
        return Batch(
            cursor=cursor,
            micro_batches=self.micro_batches(cursor.step),
            step_target_tokens=int(self._tokens.target_tokens[step_rows].sum()),
            data=pad(
                [len(ids) for ids, _ in parts],
                range(start, start + len(chosen)),
                np.concatenate([ids for ids, _ in parts]),
                np.concatenate([labels for _, labels in parts]),
            ),
        )

    def close(self) -> None:
        """Close the data's files; no batch can be asked for afterwards."""
        self._tokens.close()

    def _epoch(self, step: int) -> int:
        return (step - 1) // self._steps_per_epoch + 1

    def _step_rows(self, step: int) -> np.ndarray:
        size = self._hp.batch_size * self._hp.gradient_accumulation_steps
        start = (step - 1) % self._steps_per_epoch * size
        return self._permutation(self._epoch(step))[start : start + size]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = Generator(PCG64(SeedSequence([self._hp.seed, epoch])))
            self._order = (epoch, generator.permutation(self._rows))
        return self._order[1]

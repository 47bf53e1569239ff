"""The order of micro-batches over a whole run, computed on demand.

Each epoch is a permutation of the rows drawn from (seed, epoch), cut into micro-batches and
optimizer steps.  A step never spans two epochs.  Only one epoch's order is in memory.  The
micro-batches of an evaluation come behind those of its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence  # here: numpy loads it when it is first used

from sglang_harli.protocol.internal import BatchCursor, EvaluationBatches
from sglang_harli.protocol.micro_batches import Padded, pad
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.data.token_store import TokenReader
from sglang_harli.service.data.validation import ValidationRows, held_out


def train_rows(data: Mapping[str, Any]) -> int:
    """How many rows of a job with this ``data`` are trained: all but those that are held out."""
    return int(data["rows"]) - int(data.get("validation_rows", 0))


def total_steps(rows: int, hp: Hyperparameters) -> int:
    """Optimizer steps of a run that trains ``rows`` rows."""
    return hp.n_epochs * _steps_per_epoch(rows, hp)


def _steps_per_epoch(rows: int, hp: Hyperparameters) -> int:
    return -(-_batches_per_epoch(rows, hp) // hp.gradient_accumulation_steps)


def _batches_per_epoch(rows: int, hp: Hyperparameters) -> int:
    return -(-rows // hp.batch_size)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch; the rows' positions are those within the optimizer step, or within the
    evaluation; ``step_target_tokens``: of the whole step, or of this part of the evaluation."""

    cursor: BatchCursor
    micro_batches: int
    step_target_tokens: int
    data: Padded
    evaluation: EvaluationBatches | None  # behind its step


class BatchOrder:
    """The micro-batches of a job in the order in which they are trained.  ``validation``: the rows
    of a file of their own, which are evaluated; None: those that are held out, if any."""

    def __init__(
        self, tokens: TokenReader, hp: Hyperparameters, validation: TokenReader | None = None
    ) -> None:
        self._tokens = tokens
        self._hp = hp
        held = held_out(tokens.lines, hp)
        self._trained = np.flatnonzero(~held)
        self.validation: ValidationRows | None = None
        if validation is not None:
            self.validation = ValidationRows(validation, np.arange(len(validation)), hp)
        elif held.any():
            self.validation = ValidationRows(tokens, np.flatnonzero(held), hp)
        self._rows = len(self._trained)
        self._steps_per_epoch = _steps_per_epoch(self._rows, hp)
        self.total_steps = total_steps(self._rows, hp)
        self._order: tuple[int, np.ndarray] | None = None

    def cursor_after(self, step: int) -> BatchCursor:
        """The first micro-batch of the step after ``step`` (0: of the run)."""
        return BatchCursor(epoch=self._epoch(step + 1), step=step + 1, index=0)

    def following(self, cursor: BatchCursor) -> BatchCursor:
        """The micro-batch after ``cursor``."""
        behind = self._behind(cursor.step)
        count = self.micro_batches(cursor.step) + (behind.count if behind is not None else 0)
        if cursor.index + 1 < count:
            return BatchCursor(epoch=cursor.epoch, step=cursor.step, index=cursor.index + 1)
        return self.cursor_after(cursor.step)

    def evaluation_of(self, step: int) -> BatchCursor | None:
        """The first micro-batch of the evaluation behind a step; None: there is none."""
        if step < 1 or self._behind(step) is None:
            return None
        return BatchCursor(epoch=self._epoch(step), step=step, index=self.micro_batches(step))

    def micro_batches(self, step: int) -> int:
        """Micro-batches of an optimizer step: the last one of an epoch may have fewer."""
        first = (step - 1) % self._steps_per_epoch * self._hp.gradient_accumulation_steps
        left = _batches_per_epoch(self._rows, self._hp) - first
        return min(left, self._hp.gradient_accumulation_steps)

    def batch(self, cursor: BatchCursor) -> Batch:
        """The micro-batch at ``cursor`` (1 <= step <= total_steps)."""
        first = self.micro_batches(cursor.step)
        if cursor.index >= first and self.validation is not None:
            rows = self.validation.part(cursor.index - first)
            tokens, start, step_rows = self.validation.tokens, 0, rows
        else:
            tokens, step_rows = self._tokens, self._step_rows(cursor.step)
            start = cursor.index * self._hp.batch_size
            rows = step_rows[start : start + self._hp.batch_size]
        parts = [tokens.row(int(row)) for row in rows]
        return Batch(
            cursor=cursor,
            micro_batches=first,
            step_target_tokens=int(tokens.target_tokens[step_rows].sum()),
            data=pad(
                [len(ids) for ids, _ in parts],
                range(start, start + len(rows)),
                np.concatenate([ids for ids, _ in parts]),
                np.concatenate([labels for _, labels in parts]),
            ),
            evaluation=self._behind(cursor.step),
        )

    def close(self) -> None:
        """Close the data's files; no batch can be asked for afterwards."""
        self._tokens.close()
        if self.validation is not None:
            self.validation.close()

    def _behind(self, step: int) -> EvaluationBatches | None:
        return None if self.validation is None else self.validation.behind(step, self.total_steps)

    def _epoch(self, step: int) -> int:
        return (step - 1) // self._steps_per_epoch + 1

    def _step_rows(self, step: int) -> np.ndarray:
        size = self._hp.batch_size * self._hp.gradient_accumulation_steps
        start = (step - 1) % self._steps_per_epoch * size
        return self._permutation(self._epoch(step))[start : start + size]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = Generator(PCG64(SeedSequence([self._hp.seed, epoch])))
            self._order = (epoch, self._trained[generator.permutation(self._rows)])
        return self._order[1]

"""Micro-batches as they come in: in order, waiting for their turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from sglang_harli.errors import TrainingError
from sglang_harli.peft_trainer.rows import Rows
from sglang_harli.protocol.internal import BatchCursor, MicroBatch


@dataclass(slots=True)
class Fed:
    """A micro-batch as it was sent, and its rows."""

    batch: MicroBatch
    rows: Rows


class Intake:
    """The micro-batches of one run; the first stays in ``queue`` until its gradients are the
    step's. Ids must lie below ``vocabulary``; a step has at most ``accumulation`` micro-batches."""

    def __init__(self, vocabulary: int, accumulation: int) -> None:
        self._vocabulary, self._accumulation = vocabulary, accumulation
        self.queue: deque[Fed] = deque()
        self._epoch = 1
        self._next = (1, 0)  # (step, index) of the next one to be fed

    @property
    def cursor(self) -> BatchCursor:
        """The micro-batch to feed next (``epoch`` is that of the last one fed)."""
        return BatchCursor(epoch=self._epoch, step=self._next[0], index=self._next[1])

    def begin_at(self, epoch: int, step: int, index: int = 0) -> None:
        """Nothing is fed yet: the first one is that of ``step``, from ``index`` on."""
        self._epoch, self._next = epoch, (step, index)

    @property
    def nbytes(self) -> int:
        """Of all that waits."""
        return sum(fed.rows.nbytes for fed in self.queue)

    def feed(self, batch: MicroBatch, ids: np.ndarray, places: np.ndarray, targets: np.ndarray) -> None:
        """See ``TrainingRun.feed``."""
        cursor = batch.cursor
        if (cursor.step, cursor.index) != self._next:
            return
        self._check(batch, ids, places, targets)
        width = batch.lengths[0]
        ids = ids.reshape(len(batch.lengths), width)
        self.queue.append(
            Fed(
                batch,
                Rows(
                    batch.lengths,
                    batch.rows,
                    width,
                    ids,
                    places,
                    targets,
                    sum(batch.lengths),
                    batch.evaluates,
                ),
            )
        )
        self._epoch = cursor.epoch
        self._next = (cursor.step + 1, 0) if batch.last else (cursor.step, cursor.index + 1)

    def checked(self) -> Fed:
        """The first in the queue, its ids looked at; a quantum's work.

        Raises:
            TrainingError: ``bad_data``.
        """
        fed = self.queue[0]
        fed.rows.check(self._vocabulary, _where(fed.batch))
        return fed

    def _check(self, batch: MicroBatch, ids: np.ndarray, places: np.ndarray, targets: np.ndarray) -> None:
        lengths = batch.lengths
        if (
            not lengths
            or min(lengths) < 1
            or max(lengths) != lengths[0]
            or ids.size != len(lengths) * lengths[0]
            or len(places) != len(targets)
        ):
            raise TrainingError(
                f"{_where(batch)}: {ids.size} ids, {len(places)} places and {len(targets)} targets for rows of {lengths}",
                code="bad_data",
            )
        if batch.step_target_tokens < 1 or len(batch.rows) != len(lengths):
            raise TrainingError(f"{_where(batch)}: a step needs at least one target token", code="bad_data")
        if batch.micro_batches > self._accumulation:
            raise TrainingError(
                f"{_where(batch)}: more micro-batches than gradient_accumulation_steps", code="bad_data"
            )


def _where(batch: MicroBatch) -> str:
    if batch.evaluates:
        return f"micro-batch {batch.cursor.index - batch.micro_batches} of the evaluation of step {batch.cursor.step}"
    return f"micro-batch {batch.cursor.index} of step {batch.cursor.step}"

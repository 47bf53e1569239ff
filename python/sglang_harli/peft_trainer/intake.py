"""Micro-batches as they come in: checked, in order, waiting for their turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from sglang_harli.errors import TrainingError
from sglang_harli.peft_trainer.rows import IGNORED, Rows
from sglang_harli.protocol.internal import BatchCursor, MicroBatch


@dataclass(slots=True)
class Fed:
    """A micro-batch as it was sent, and its rows."""

    batch: MicroBatch
    rows: Rows


class Intake:
    """The queue of micro-batches of one run.

    Args:
        vocabulary: ids must lie below it.
        accumulation: most micro-batches of a step.

    Attributes:
        queue: the first one stays in it until its gradients are the step's.
    """

    def __init__(self, vocabulary: int, accumulation: int) -> None:
        self._vocabulary, self._accumulation = vocabulary, accumulation
        self.queue: deque[Fed] = deque()
        self._epoch = 1
        self._next = (1, 0)  # (step, index) of the next one to be fed

    @property
    def cursor(self) -> BatchCursor:
        """The micro-batch to feed next (``epoch`` is that of the last one fed)."""
        return BatchCursor(epoch=self._epoch, step=self._next[0], index=self._next[1])

    def begin_at(self, epoch: int, step: int) -> None:
        """Nothing is fed yet: the first one is that of ``step``."""
        self._epoch, self._next = epoch, (step, 0)

    def feed(self, batch: MicroBatch, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """See ``TrainingRun.feed``."""
        cursor = batch.cursor
        if (cursor.step, cursor.index) != self._next:
            return
        self._check(batch, input_ids, labels)
        self.queue.append(Fed(batch, Rows.make(batch.lengths, batch.rows, input_ids, labels)))
        self._epoch = cursor.epoch
        last = cursor.index + 1 == batch.micro_batches
        self._next = (cursor.step + 1, 0) if last else (cursor.step, cursor.index + 1)

    def _check(self, batch: MicroBatch, input_ids: np.ndarray, labels: np.ndarray) -> None:
        where = f"micro-batch {batch.cursor.index} of step {batch.cursor.step}"
        total = sum(batch.lengths)
        if not batch.lengths or min(batch.lengths) < 1 or not len(input_ids) == len(labels) == total:
            raise TrainingError(
                f"{where}: {len(input_ids)} ids and {len(labels)} labels for rows of {batch.lengths}",
                code="bad_data",
            )
        targets = labels[labels != IGNORED]
        for name, values in (("token", input_ids), ("label", targets)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self._vocabulary:
                raise TrainingError(
                    f"{where}: {name} ids must lie in 0..{self._vocabulary - 1}, "
                    f"found {int(values.min())}..{int(values.max())}: was the file made for another tokenizer?",
                    code="bad_data",
                )
        if batch.step_target_tokens < 1 or len(batch.rows) != len(batch.lengths):
            raise TrainingError(f"{where}: a step needs at least one target token", code="bad_data")
        if batch.micro_batches > self._accumulation:
            raise TrainingError(
                f"{where}: more micro-batches than gradient_accumulation_steps", code="bad_data"
            )

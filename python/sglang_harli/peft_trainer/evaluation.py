"""The evaluations of one run: their sums, and what those that are over came to.

Sums stay on the device; a result that has reached the host is handed out, and nothing waits for it
but the run's next quantum: whether training ends early must be known before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_harli.peft_trainer.intake import Fed
from sglang_harli.peft_trainer.records import Arriving
from sglang_harli.protocol.internal import EvaluationState
from sglang_harli.protocol.public import Hyperparameters


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """One evaluation.

    Attributes:
        loss: mean cross-entropy over the target tokens of its sample, natural logarithm.
        accuracy: share of those that are predicted right, given all tokens before.
        rows, target_tokens: of the sample.
        full_loss, full_accuracy: the same over all validation rows; None: not all were evaluated.
        state: what the run's evaluations have come to with this one.
    """

    step: int
    epoch: int
    loss: float
    accuracy: float
    rows: int
    target_tokens: int
    full_loss: float | None
    full_accuracy: float | None
    state: EvaluationState


class Evaluations:
    """Of one run on ``device``.

    Attributes:
        state: behind the last one whose result is known.
    """

    def __init__(self, device: torch.device, hyperparameters: Hyperparameters, total_steps: int) -> None:
        self._hp, self._total_steps = hyperparameters, total_steps
        self.state = EvaluationState()
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct predictions
        self._sample = torch.zeros_like(self._sums)
        self._rows = self._targets = self._sample_rows = self._sample_targets = 0
        self._arriving: Arriving | None = None
        self._last: Fed | None = None

    @property
    def settling(self) -> bool:
        """A result is on its way to the host."""
        return self._arriving is not None

    @property
    def stopped(self) -> bool:
        """Training ends here, before the last step."""
        return self.state.stops(self._hp.early_stopping_patience, self._total_steps)

    def add(self, fed: Fed, loss: Tensor, correct: Tensor) -> None:
        """A micro-batch is evaluated; ``loss``, ``correct``: its sums."""
        batch = fed.batch
        assert batch.evaluation is not None
        done = batch.cursor.index - batch.micro_batches + 1
        sums = torch.stack([loss, correct])
        if done == 1:  # what a run that was restored had summed is gone
            self._sums.copy_(sums)
            self._rows = self._targets = 0
        else:
            self._sums.add_(sums)
        self._rows += fed.rows.count
        self._targets += len(fed.rows.targets)
        if done == batch.evaluation.sampled:
            self._sample.copy_(self._sums)
            self._sample_rows, self._sample_targets = self._rows, self._targets
        if batch.last:
            self._last = fed
            self._arriving = Arriving(torch.cat([self._sample, self._sums]))

    def take(self) -> list[EvaluationMetrics]:
        """The evaluation that is over, once its result has arrived."""
        if self._arriving is None or not self._arriving.ready:
            return []
        assert self._last is not None and self._last.batch.evaluation is not None
        loss, correct, full_loss, full_correct = self._arriving.values.tolist()
        batch, whole = self._last.batch, self._last.batch.evaluation.whole
        self._arriving = self._last = None
        loss /= self._sample_targets
        self.state = self.state.after(batch.cursor.step, loss, self._hp.early_stopping_min_delta)
        return [
            EvaluationMetrics(
                step=batch.cursor.step,
                epoch=batch.cursor.epoch,
                loss=loss,
                accuracy=correct / self._sample_targets,
                rows=self._sample_rows,
                target_tokens=self._sample_targets,
                full_loss=full_loss / self._targets if whole else None,
                full_accuracy=full_correct / self._targets if whole else None,
                state=self.state,
            )
        ]

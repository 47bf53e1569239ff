"""Training and evaluation as one stream of micro-batches, and the loss that a plain loop finds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.utils import set_peft_model_state_dict

from sglang_harli.peft_trainer.adapter import lora_config
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, EvaluationBatches, MicroBatch
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from support.trainer.trainer_oracle import Step

Row = tuple[list[int], list[int]]  # ids, labels


@dataclass
class Validation:
    """Rows that are evaluated behind every ``every``-th step and the last one, ``size`` at once."""

    rows: list[Row]
    every: int
    size: int
    sampled: int | None = None  # micro-batches of an evaluation, but of the last one

    def behind(self, step: int, last: int) -> tuple[EvaluationBatches | None, list[list[Row]]]:
        if step != last and step % self.every:
            return None, []
        parts = [self.rows[i : i + self.size] for i in range(0, len(self.rows), self.size)]
        sampled, whole = self.sampled or len(parts), self.sampled is None or step == last
        parts = parts if whole else parts[:sampled]
        return EvaluationBatches(count=len(parts), sampled=sampled, whole=whole), parts


def feed_all(run: TrainingRun, steps: list[Step], validation: Validation, start: int = 1) -> None:
    """All micro-batches of the steps from ``start`` on, and what is evaluated behind each."""
    for number, step in enumerate(steps, start=1):
        if number < start - 1:
            continue
        behind, parts = validation.behind(number, len(steps))
        whole = [[step.rows[i] for i in micro] for micro in step.micro]
        positions = [*step.micro, *(list(range(len(part))) for part in parts)]
        for index, rows in enumerate([*whole, *parts]):
            batch = MicroBatch(
                job="j",
                attempt=1,
                cursor=BatchCursor(epoch=1, step=number, index=index),
                micro_batches=len(step.micro),
                lengths=[len(ids) for ids, _ in rows],
                rows=positions[index],
                step_target_tokens=step.targets,
                evaluation=behind,
            )
            ids = np.array([t for row, _ in rows for t in row], dtype=np.int32)
            labels = np.array([t for _, row in rows for t in row], dtype=np.int32)
            run.feed(*padded(batch, ids, labels))


def plain_evaluation(
    model, hp: Hyperparameters, weights: dict[str, torch.Tensor], rows: Sequence[Row]
) -> tuple[float, float]:
    """Mean loss and token accuracy of ``rows`` by transformers and peft, one row at a time."""
    peft_model = get_peft_model(copy.deepcopy(model), lora_config(hp)).eval()
    set_peft_model_state_dict(peft_model, weights)
    loss, correct, targets = 0.0, 0, 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = peft_model(input_ids=torch.tensor([ids])).logits[0, :-1]
            wanted = torch.tensor(labels[1:])
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            correct += int((logits.argmax(-1) == wanted).sum())
            targets += int((wanted != -100).sum())
    return loss / targets, correct / targets

"""The learning rate of each optimizer step, by transformers' own schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_scheduler

from sglang_harli.protocol.public import Hyperparameters

_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class LearningRate:
    """A pure function of the step: nothing is saved. ``total_steps``: of the whole run."""

    def __init__(self, hyperparameters: Hyperparameters, total_steps: int) -> None:
        self.peak = hyperparameters.learning_rate
        # LambdaLR wants an optimizer; only the factor that it holds is of use here.
        holder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler: Any = get_scheduler(
            _NAMES[hyperparameters.lr_scheduler],
            holder,
            num_warmup_steps=warmup_steps(hyperparameters.warmup_ratio, total_steps),
            num_training_steps=total_steps,
        )
        self._factor = scheduler.lr_lambdas[0]

    def at(self, step: int) -> float:
        """The rate that optimizer step ``step`` (counted from 1) is taken with."""
        return self.peak * self._factor(step - 1)


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps that warm up, rounded up as in transformers' Trainer. Never all of them: the first
    warm-up step has rate 0, so a run of one step would learn nothing."""
    return min(math.ceil(ratio * total_steps), total_steps - 1)

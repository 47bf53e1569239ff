"""Which rows of a job are evaluated, and in which micro-batches: fixed from its first step on.

They come from a file of their own, or are held out of the training rows.  A sample of them is the
same at each evaluation, so that the losses can be compared.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence  # here: numpy loads it when it is first used

from sglang_harli.errors import DataError
from sglang_harli.protocol.internal import EvaluationBatches
from sglang_harli.protocol.public import DEFAULT_EVAL_STEPS, Hyperparameters
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenReader

FILE = "validation.jsonl"  # a job's validation file, beside the training file
FOLDER = "validation"  # its rows, beside the training rows
_SPLIT, _SAMPLE = (0, 0), (0, 1)  # epochs, the keys of other orders, begin with 1


def held_out(lines: np.ndarray, hp: Hyperparameters) -> np.ndarray:
    """For each row of these ``lines`` whether ``validation_split`` holds it out.  The rows of one
    line stay together: they are parts of one conversation."""
    numbers = np.unique(lines)
    if not hp.validation_split or len(numbers) < 2:
        return np.zeros(len(lines), dtype=bool)
    count = max(1, round(hp.validation_split * len(numbers)))
    return np.isin(lines, _shuffled(numbers, hp.seed, _SPLIT)[:count])


def hold_out(folder: Path, hp: Hyperparameters, summary: DataSummary) -> None:
    """Note in ``summary`` how many of the rows in ``folder`` are held out.  Raises DataError: there
    is only one line, which cannot be in both parts."""
    if not hp.validation_split:
        return
    tokens = TokenReader(folder)
    try:
        held = int(held_out(tokens.lines, hp).sum())
    finally:
        tokens.close()
    if not held:
        raise DataError(
            f"{summary.file}: validation_split={hp.validation_split:g} needs at least 2 lines of data, and there is one",
            param="data",
        )
    summary.validation_rows = held


def _shuffled(values: np.ndarray, seed: int, key: tuple[int, int]) -> np.ndarray:
    return Generator(PCG64(SeedSequence([seed, *key]))).permutation(values)


class ValidationRows:
    """The rows that are evaluated: ``rows`` of ``tokens``.

    Attributes:
        rows: how many there are.
    """

    def __init__(self, tokens: TokenReader, rows: np.ndarray, hp: Hyperparameters) -> None:
        self.tokens, self.rows = tokens, len(rows)
        self._every = DEFAULT_EVAL_STEPS if hp.eval_steps is None else hp.eval_steps
        sample, rest = rows, rows[:0]
        if hp.eval_rows is not None and hp.eval_rows < len(rows):
            shuffled = _shuffled(rows, hp.seed, _SAMPLE)
            sample, rest = shuffled[: hp.eval_rows], shuffled[hp.eval_rows :]
        self._sampled = math.ceil(len(sample) / hp.batch_size)
        self._parts = [*self._cut(sample, hp.batch_size), *self._cut(rest, hp.batch_size)]

    def _cut(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Micro-batches of rows of like length: they take the least padding."""
        lengths = self.tokens.offsets[rows + 1] - self.tokens.offsets[rows]
        ordered = rows[np.argsort(-lengths, kind="stable")]
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def behind(self, step: int, total_steps: int) -> EvaluationBatches | None:
        """What is evaluated behind a step: all rows behind the last one, else a sample of them if
        there is one; None: nothing."""
        if step != total_steps and not (self._every and step % self._every == 0):
            return None
        whole = step == total_steps or self._sampled == len(self._parts)
        count = len(self._parts) if whole else self._sampled
        return EvaluationBatches(count=count, sampled=self._sampled, whole=whole)

    def part(self, index: int) -> np.ndarray:
        """The rows of micro-batch ``index`` of an evaluation."""
        return self._parts[index]

    def close(self) -> None:
        self.tokens.close()

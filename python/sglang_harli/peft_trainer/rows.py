"""A micro-batch's rows on the host: views on what was sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_harli.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch's rows, sorted by falling length (``protocol.micro_batches.Padded``).

    Attributes:
        lengths: tokens of each row; width: the longest; tokens: their sum, without padding.
        positions: of each row within its optimizer step.
        ids: int32 ``[rows, width]``, 0 on padding.
        evaluated: they are not trained: no layer's input is kept.
        target_places: int32, flat places (row * width + column) whose hidden state predicts a
            target.
        targets: int32, the token ids to predict there.
    """

    lengths: list[int]
    positions: list[int]
    width: int
    ids: np.ndarray
    target_places: np.ndarray
    targets: np.ndarray
    tokens: int
    evaluated: bool = False

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self.ids.nbytes + self.target_places.nbytes + self.targets.nbytes

    def check(self, vocabulary: int, where: str) -> None:
        """Look at every id; a quantum's work.

        Raises:
            TrainingError: ``bad_data``: ids outside the vocabulary, or targets outside the rows.
        """
        for name, values, most in (
            ("token ids", self.ids, vocabulary),
            ("label ids", self.targets, vocabulary),
            ("places of targets", self.target_places, self.ids.size),
        ):
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < most:
                raise TrainingError(
                    f"{where}: {name} must lie in 0..{most - 1}, found {int(values.min())}..{int(values.max())}: "
                    "was the file made for another tokenizer?",
                    code="bad_data",
                )

"""A micro-batch's rows on the host, as the trainer wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100  # a label that is no target


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch's rows on the host, sorted by falling length.

    Attributes:
        lengths: tokens of each row.
        positions: of each row within its optimizer step.
        width: the longest.
        ids: int64 ``[rows, width]``, 0 on padding.
        target_places: int64, flat places (row * width + column) whose hidden state predicts a target.
        targets: int64, the token ids to predict there.
    """

    lengths: list[int]
    positions: list[int]
    width: int
    ids: np.ndarray
    target_places: np.ndarray
    targets: np.ndarray

    @classmethod
    def make(
        cls, lengths: Sequence[int], positions: Sequence[int], ids: np.ndarray, labels: np.ndarray
    ) -> Rows:
        """From flat int32 ids and labels of ``sum(lengths)``; labels stand at their own token."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        width = max(lengths)
        padded = np.zeros((len(lengths), width), dtype=np.int64)
        places, targets = [], []
        for row, i in enumerate(order):
            span = slice(starts[i], starts[i + 1])
            padded[row, : lengths[i]] = ids[span]
            wanted = labels[span][1:]
            columns = np.flatnonzero(wanted != IGNORED)
            places.append(row * width + columns)
            targets.append(wanted[columns].astype(np.int64))
        return cls(
            [lengths[i] for i in order],
            [positions[i] for i in order],
            width,
            padded,
            np.concatenate(places),
            np.concatenate(targets),
        )

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

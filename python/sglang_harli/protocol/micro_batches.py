"""A micro-batch's arrays from the service to the trainer: padded, sorted and checked for their
form, so that the scheduler's thread only makes views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from sglang_harli.protocol.internal import MicroBatch

IGNORED = -100  # a label that is no target


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows by falling length.

    Attributes:
        lengths, positions: tokens of each row, and its place within the optimizer step.
        ids: int32 ``[rows, longest]``, 0 on padding.
        places: int32, flat places (row * longest + column) whose hidden state predicts a target.
        targets: int32, the token ids to predict there.
    """

    lengths: list[int]
    positions: list[int]
    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The frames behind a MicroBatch."""
        return self.ids, self.places, self.targets

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self.ids.nbytes + self.places.nbytes + self.targets.nbytes


def pad(lengths: Sequence[int], positions: Sequence[int], ids: np.ndarray, labels: np.ndarray) -> Padded:
    """From flat ids and labels of ``sum(lengths)``; labels stand at their own token, as in
    transformers; a row's first one never counts."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    width = max(lengths)
    padded = np.zeros((len(lengths), width), dtype=np.int32)
    places, targets = [], []
    for row, i in enumerate(order):
        span = slice(starts[i], starts[i + 1])
        padded[row, : lengths[i]] = ids[span]
        wanted = labels[span][1:]
        columns = np.flatnonzero(wanted != IGNORED)
        places.append((row * width + columns).astype(np.int32))
        targets.append(wanted[columns].astype(np.int32))
    return Padded(
        [lengths[i] for i in order],
        [positions[i] for i in order],
        padded,
        np.concatenate(places),
        np.concatenate(targets),
    )


def padded(
    batch: MicroBatch, ids: np.ndarray, labels: np.ndarray
) -> tuple[MicroBatch, np.ndarray, np.ndarray, np.ndarray]:
    """A micro-batch of flat rows in any order, as it is sent: the message, and its arrays."""
    found = pad(batch.lengths, batch.rows, ids, labels)
    return msgspec.structs.replace(batch, lengths=found.lengths, rows=found.positions), *found.arrays

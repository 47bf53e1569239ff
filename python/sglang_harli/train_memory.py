"""The memory that training asks for: leases by purpose, in which tensors are carved.

A ``TrainMemory`` is the unified pool's (``mem_cache.train_arena``), or torch's own under a budget
(``peft_trainer.memory.heap``): the trainer does not know which.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from sglang_harli.core import MemoryPurpose

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 256  # bytes; of every carved tensor

Specs = Sequence[tuple[Sequence[int], "torch.dtype"]]  # (shape, dtype) of each tensor


def aligned(nbytes: int) -> int:
    """Bytes that a tensor of ``nbytes`` takes of a lease."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def carved_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a carved tensor takes of its lease, alignment included."""
    return aligned(math.prod(shape) * dtype.itemsize)


class Lease(ABC):
    """Memory lent to training for one purpose (``nbytes`` of its owner's), until it is given back.
    It may be used again: for the tensors asked for, or as many, none larger."""

    nbytes: int
    _sizes: list[int]  # bytes of the tensors that it was asked for, each aligned

    @abstractmethod
    def _take(self, nbytes: int) -> Tensor:
        """The next ``nbytes``, flat uint8; MemoryError: no room, or the lease was given back."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all carved tensors (the caller holds none any more); the memory stays."""

    @abstractmethod
    def give_back(self) -> None:
        """Return the memory; may be repeated.  Tensors carved from it must not be used any more."""

    def carve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in this lease, contents undefined; MemoryError as ``_take``."""
        return self._take(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    @property
    def asked_bytes(self) -> int:
        """What it was asked for; ``nbytes`` may be more."""
        return sum(self._sizes)

    def holds(self, specs: Specs) -> bool:
        """Whether ``carve_all`` has room for these."""
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        return len(sizes) == len(self._sizes) and all(map(operator.le, sizes, self._sizes))

    def carve_all(self, specs: Specs) -> list[Tensor]:
        """All of them, contiguous, contents undefined; what was carved before is gone."""
        self.reset()
        carved = []
        for (shape, dtype), size in zip(specs, self._sizes, strict=True):
            # Whole, whatever is used of it: with separate extents, a plan has placed each.
            place = self._take(size)
            carved.append(place[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape)))
        return carved


class TrainMemory(Protocol):
    """Gives leases and never waits: None where there is none now; it may be asked for again."""

    @property
    def scattered(self) -> bool:
        """Enough was free for what was asked for last, but not in pieces that are large enough:
        smaller tensors may be had."""
        ...

    def obtain(self, purpose: MemoryPurpose, specs: Specs) -> Lease | None:
        """A lease in which these tensors can be carved, in this order; None: not now.

        ``purpose`` decides what goes first under pressure.

        Raises:
            ConfigError: there never is one.
        """
        ...

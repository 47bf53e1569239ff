"""A training memory that shows reads of what was not written, and of what was given back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.peft_trainer.memory.interface import Specs, carved_bytes

POISON = 0xFF  # four of them are NaN in every floating-point format


class PoisonedMemory:
    """Spaces full of NaN, before they are written and after they are given back.

    Args:
        grants: whether a purpose may have so many bytes now; None: always.

    Attributes:
        asked: (purpose, bytes) of each request, granted or not.
        held: spaces that are not given back.
    """

    def __init__(self, grants: Callable[[MemoryPurpose, int], bool] | None = None) -> None:
        self.grants = grants
        self.asked: list[tuple[MemoryPurpose, int]] = []
        self.held: list[PoisonedSpace] = []

    def obtain(self, purpose: MemoryPurpose, tensors: Specs) -> PoisonedSpace | None:
        nbytes = sum(carved_bytes(shape, dtype) for shape, dtype in tensors)
        self.asked.append((purpose, nbytes))
        if self.grants is not None and not self.grants(purpose, nbytes):
            return None
        space = PoisonedSpace(self, purpose, nbytes)
        assert not space.flat.is_inference()
        self.held.append(space)
        return space

    def bytes_of(self, purpose: MemoryPurpose) -> int:
        """Held now."""
        return sum(space.nbytes for space in self.held if space.purpose == purpose)

    @property
    def addresses(self) -> list[range]:
        """Of the spaces held."""
        return [range(s.flat.data_ptr(), s.flat.data_ptr() + s.nbytes) for s in self.held]


class PoisonedSpace:
    """See ``PoisonedMemory``."""

    def __init__(self, owner: PoisonedMemory, purpose: MemoryPurpose, nbytes: int) -> None:
        self.purpose, self.nbytes = purpose, nbytes
        self.flat = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._owner = owner
        self._used = 0
        self._over = False

    def carve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._over or self._used + size > self.nbytes:
            raise MemoryError(f"{size} bytes at {self._used} of {self.nbytes}, given back: {self._over}")
        part = self.flat[self._used : self._used + size]
        self._used += carved_bytes(shape, dtype)
        return part.fill_(POISON).view(dtype).view(tuple(shape))

    def reset(self) -> None:
        self._used = 0
        self.flat.fill_(POISON)

    def give_back(self) -> None:
        if not self._over:
            self._over = True
            self.flat.fill_(POISON)
            self._owner.held.remove(self)

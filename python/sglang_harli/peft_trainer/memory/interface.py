"""Where training's sizeable tensors live: asked for by purpose, given as spaces that tensors are carved from.

The trainer does not know the unified pool (``mem_cache``): it asks a ``TrainMemory``.  ``HeapMemory`` is the one
without a pool: torch's own allocator under a budget, for models whose KV cache cannot be shared and for a
trainer on its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.protocol.job_limits import ALIGNMENT as ALIGNMENT
from sglang_harli.protocol.job_limits import carved

Specs = Sequence[tuple[Sequence[int], torch.dtype]]  # (shape, dtype) of each tensor


def carved_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a carved tensor takes of its space, alignment included."""
    return carved(math.prod(shape) * dtype.itemsize)


class Space(Protocol):
    """Memory held for one purpose until it is given back."""

    nbytes: int

    def carve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in this space; contents undefined.

        Raises:
            MemoryError: the space has no room for it.
        """
        ...

    def reset(self) -> None:
        """Forget all carved tensors (the caller holds none any more); the memory stays."""
        ...

    def give_back(self) -> None:
        """Return the memory; may be repeated.  Tensors carved from it must not be used any more."""
        ...


class TrainMemory(Protocol):
    """Gives spaces.  Never waits: None where there is none now; it may be asked for again."""

    def obtain(self, purpose: MemoryPurpose, tensors: Specs) -> Space | None:
        """A space in which these tensors can be carved, in this order.

        Args:
            purpose: decides what goes first under pressure.
            tensors: (shape, dtype) of each.
        """
        ...


def ask(memory: TrainMemory, purpose: MemoryPurpose, tensors: Specs) -> Space | None:
    """``memory.obtain``, outside SGLang's inference mode: what is made of memory that came as a tensor of that mode
    could not be trained on."""
    with torch.inference_mode(False):
        return memory.obtain(purpose, tensors)


class HeapMemory:
    """Torch's allocator under a budget.

    Args:
        device: where the tensors lie.
        budget: bytes for all spaces together; None: no bound.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device, self.budget = device, budget
        self.used = 0

    def obtain(self, purpose: MemoryPurpose, tensors: Specs) -> Space | None:
        nbytes = sum(carved_bytes(shape, dtype) for shape, dtype in tensors)
        if self.budget is not None and self.used + nbytes > self.budget:
            return None
        return _HeapSpace(self, nbytes)


class _HeapSpace:
    """One allocation; see ``Space``.  Made at the first ``carve``: that is where the stream that trains is current,
    and to that one torch's CUDA allocator ties the memory."""

    def __init__(self, owner: HeapMemory, nbytes: int) -> None:
        self.nbytes = nbytes
        self._owner: HeapMemory | None = owner
        self._flat: Tensor | None = None
        self._used = 0
        owner.used += nbytes

    def carve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._owner is not None and self._flat is None:
            self._flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self._owner.device)
        if self._flat is None or self._used + size > self.nbytes:
            raise MemoryError(
                f"no room for {size} bytes in a space of {self.nbytes}, {self._used} of them carved"
            )
        part = self._flat.narrow(0, self._used, size).view(dtype).view(tuple(shape))
        self._used += carved_bytes(shape, dtype)
        return part

    def reset(self) -> None:
        self._used = 0

    def give_back(self) -> None:
        if self._owner is not None:
            self._owner.used -= self.nbytes
            self._owner = self._flat = None


class Room:
    """A space that is used again and again: for the tensors that it was asked for, or as many, none of them larger.

    Args:
        space: as ``memory.obtain`` gave it for ``tensors``.
    """

    def __init__(self, space: Space, tensors: Specs) -> None:
        self.space = space
        self._sizes = [carved_bytes(shape, dtype) for shape, dtype in tensors]

    @classmethod
    def obtain(cls, memory: TrainMemory, purpose: MemoryPurpose, tensors: Specs) -> Room | None:
        """See ``TrainMemory.obtain``."""
        space = ask(memory, purpose, tensors)
        return None if space is None else cls(space, tensors)

    @property
    def nbytes(self) -> int:
        """Asked for; the space may have more."""
        return sum(self._sizes)

    def holds(self, tensors: Specs) -> bool:
        sizes = [carved_bytes(shape, dtype) for shape, dtype in tensors]
        return len(sizes) == len(self._sizes) and all(map(operator.le, sizes, self._sizes))

    def carve(self, tensors: Specs) -> list[Tensor]:
        """All of them, contiguous, contents undefined; those of the time before are gone."""
        self.space.reset()
        carved = []
        for (shape, dtype), size in zip(tensors, self._sizes, strict=True):
            # whole, whatever is used of it: where extents are separate, a plan says which tensor lies where
            place = self.space.carve((size,), torch.uint8)
            carved.append(place[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape)))
        return carved

    def give_back(self) -> None:
        self.space.give_back()

"""A training memory that shows reads of what was not written, and of what was given back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.train_memory import Lease, Specs, aligned, carved_bytes

POISON = 0xFF  # four of them are NaN in every floating-point format


class PoisonedMemory:
    """Leases full of NaN, before they are written and after they are given back.

    Args:
        grants: whether a purpose may have so many bytes now; None: always.

    Attributes:
        asked: (purpose, bytes) of each request, granted or not.
        held: leases that are not given back.
    """

    scattered = False

    def __init__(self, grants: Callable[[MemoryPurpose, int], bool] | None = None) -> None:
        self.grants = grants
        self.asked: list[tuple[MemoryPurpose, int]] = []
        self.held: list[PoisonedLease] = []

    def obtain(self, purpose: MemoryPurpose, specs: Specs) -> PoisonedLease | None:
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        self.asked.append((purpose, sum(sizes)))
        if self.grants is not None and not self.grants(purpose, sum(sizes)):
            return None
        lease = PoisonedLease(self, purpose, sizes)
        assert not lease.flat.is_inference()
        self.held.append(lease)
        return lease

    def bytes_of(self, purpose: MemoryPurpose) -> int:
        """Held now."""
        return sum(lease.nbytes for lease in self.held if lease.purpose == purpose)

    @property
    def addresses(self) -> list[range]:
        """Of the leases held."""
        return [range(s.flat.data_ptr(), s.flat.data_ptr() + s.nbytes) for s in self.held]


class PoisonedLease(Lease):
    """See ``PoisonedMemory``."""

    def __init__(self, owner: PoisonedMemory, purpose: MemoryPurpose, sizes: list[int]) -> None:
        self.purpose, self.nbytes = purpose, sum(sizes)
        self.flat = torch.full((self.nbytes,), POISON, dtype=torch.uint8)
        self._sizes = sizes
        self._owner = owner
        self._used = 0
        self._over = False

    def _take(self, nbytes: int) -> Tensor:
        if self._over or self._used + nbytes > self.nbytes:
            raise MemoryError(f"{nbytes} bytes at {self._used} of {self.nbytes}, given back: {self._over}")
        part = self.flat[self._used : self._used + nbytes]
        self._used += aligned(nbytes)
        return part.fill_(POISON)

    def reset(self) -> None:
        self._used = 0
        self.flat.fill_(POISON)

    def give_back(self) -> None:
        if not self._over:
            self._over = True
            self.flat.fill_(POISON)
            self._owner.held.remove(self)

"""Training's memory without a pool: torch's own allocator under a budget.

For models whose KV cache cannot be shared, and for a trainer on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.train_memory import Lease, Specs, TrainMemory, aligned, carved_bytes


def obtain(memory: TrainMemory, purpose: MemoryPurpose, specs: Specs) -> Lease | None:
    """``memory.obtain`` outside SGLang's inference mode, whose tensors could not be trained on."""
    with torch.inference_mode(False):
        return memory.obtain(purpose, specs)


class HeapMemory:
    """Torch's allocator under a ``budget``: bytes of all leases together; None: no bound."""

    scattered = False

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device, self.budget = device, budget
        self.used = 0

    def obtain(self, purpose: MemoryPurpose, specs: Specs) -> Lease | None:
        """See ``TrainMemory``."""
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        if self.budget is not None and self.used + sum(sizes) > self.budget:
            return None
        return HeapLease(self, sizes)


class HeapLease(Lease):
    """One allocation, at the first carve: torch ties CUDA memory to the current stream."""

    def __init__(self, owner: HeapMemory, sizes: list[int]) -> None:
        self._sizes, self.nbytes = sizes, sum(sizes)
        self._owner: HeapMemory | None = owner
        self._flat: Tensor | None = None
        self._used = 0
        owner.used += self.nbytes

    def _take(self, nbytes: int) -> Tensor:
        if self._owner is not None and self._flat is None:
            self._flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self._owner.device)
        if self._flat is None or self._used + nbytes > self.nbytes:
            raise MemoryError(
                f"no room for {nbytes} bytes in a lease of {self.nbytes}, {self._used} of them carved"
            )
        part = self._flat.narrow(0, self._used, nbytes)
        self._used += aligned(nbytes)
        return part

    def reset(self) -> None:
        self._used = 0

    def give_back(self) -> None:
        if self._owner is not None:
            self._owner.used -= self.nbytes
            self._owner = self._flat = None

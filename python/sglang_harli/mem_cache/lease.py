"""A lease of the pool: stripes lent to training, and which of its tensors lies where in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.train_memory import Lease, Specs, aligned, carved_bytes

Spot = tuple[int, int]  # (extent, byte in it)


def place(extents: Sequence[int], sizes: Sequence[int]) -> list[Spot] | None:
    """A spot for each tensor: in order in one extent, else first fit, the largest first.
    ``extents``, ``sizes``: bytes (sizes are multiples of ``ALIGNMENT``). None: they do not fit."""
    order = range(len(sizes))
    if len(extents) > 1:
        order = sorted(order, key=lambda index: -sizes[index])
    used = [0] * len(extents)
    spots: list[Spot] = [(0, 0)] * len(sizes)
    for index in order:
        size = sizes[index]
        extent = next((e for e, room in enumerate(extents) if room - used[e] >= size), None)
        if extent is None:
            return None
        spots[index] = (extent, used[extent])
        used[extent] += size
    return spots


class PoolLease(Lease):
    """Stripes of the pool, lent for one purpose.

    Args:
        extents: their memory, each extent contiguous.
        release: ends the lease in the pool.

    Attributes:
        purpose: decides what goes first under pressure.
        name: its name in the ledger; stripes: what is lent; nbytes: their bytes.
        revoked: it was given back; nothing can be carved from it any more.
    """

    def __init__(
        self,
        purpose: MemoryPurpose,
        name: str,
        stripes: tuple[int, ...],
        extents: list[Tensor],
        release: Callable[[PoolLease], None],
    ) -> None:
        self.purpose, self.name, self.stripes = purpose, name, stripes
        self.nbytes = sum(extent.numel() for extent in extents)
        self.revoked = False
        self.extents = extents
        self._release = release
        self._sizes = []
        self._spots: list[Spot] = []  # of ``_sizes``
        self._carved = 0  # tensors carved in the order of the plan; -1: the plan was left
        self._used = [0] * len(extents)

    def plan(self, specs: Specs) -> bool:
        """Place these tensors, to be carved next in this order; resets the lease. Returns whether
        they fit; where not, nothing has changed."""
        sizes = [carved_bytes(shape, dtype) for shape, dtype in specs]
        spots = place([extent.numel() for extent in self.extents], sizes)
        if spots is None:
            return False
        self._sizes, self._spots = sizes, spots
        self.reset()
        return True

    def _take(self, nbytes: int) -> Tensor:
        if self.revoked:
            raise MemoryError(f"lease {self.name!r} was given back: nothing can be carved from it")
        extent, start = self._spot(aligned(nbytes))
        return self.extents[extent].narrow(0, start, nbytes)

    def _spot(self, size: int) -> Spot:
        """The next tensor's place: as planned while sizes are the plan's, else in the best fit."""
        if 0 <= self._carved < len(self._sizes) and self._sizes[self._carved] == size:
            extent, start = self._spots[self._carved]
            self._carved += 1
        else:
            self._carved = -1
            left = [
                (e.numel() - used, i)
                for i, (e, used) in enumerate(zip(self.extents, self._used, strict=True))
            ]
            fitting = [(free, index) for free, index in left if free >= size]
            if not fitting:
                raise MemoryError(
                    f"no room for {size} bytes in lease {self.name!r}: of its {self.nbytes} bytes the "
                    f"largest free piece has {max(free for free, _ in left)}"
                )
            extent = min(fitting)[1]
            start = self._used[extent]
        self._used[extent] = max(self._used[extent], start + size)
        return extent, start

    def reset(self) -> None:
        self._carved = 0
        self._used = [0] * len(self.extents)

    def give_back(self) -> None:
        """Return the memory to the KV cache; may be repeated."""
        if not self.revoked:
            self._release(self)

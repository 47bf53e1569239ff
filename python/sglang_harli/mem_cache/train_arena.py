"""Training's spaces in the pool: a lease of stripes in which tensors are carved.

Implements ``peft_trainer.memory.interface.TrainMemory`` and ``Space`` by structure; the two rooms do not import each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of

if TYPE_CHECKING:
    from sglang_harli.mem_cache.unified_pool import UnifiedPool

ALIGNMENT = 256  # bytes; of every carved tensor, as in peft_trainer.memory.interface

Tensors = Sequence[tuple[Sequence[int], torch.dtype]]  # (shape, dtype) of each
Spot = tuple[int, int]  # (extent, byte in it)


def carved_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a carved tensor takes of its lease, alignment included."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def place(extents: Sequence[int], sizes: Sequence[int]) -> list[Spot] | None:
    """A spot for each tensor: in order where there is one extent, else first fit, the largest first.

    Args:
        extents: bytes of each extent.
        sizes: bytes of each tensor, multiples of ``ALIGNMENT``.

    Returns:
        The spots in the order of ``sizes``; None: they do not fit.
    """
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


def separate_extents(geometry: PoolGeometry, stripes: Sequence[int]) -> list[int]:
    """Bytes of each extent where nothing is remapped: one for each run of adjacent stripes and buffer."""
    return [len(run) * geometry.chunk_bytes for run in runs_of(stripes) for _ in range(geometry.buffers)]


class Lease:
    """Stripes lent to training for one purpose; see ``peft_trainer.memory.interface.Space``.

    Attributes:
        purpose: decides what goes first under pressure.
        name: its name in the ledger.
        stripes: what is lent.
        nbytes: their bytes.
        revoked: it was given back; nothing can be carved from it any more.
    """

    def __init__(
        self,
        pool: UnifiedPool,
        purpose: MemoryPurpose,
        name: str,
        stripes: tuple[int, ...],
        extents: list[Tensor],
    ) -> None:
        self.purpose, self.name, self.stripes = purpose, name, stripes
        self.nbytes = sum(extent.numel() for extent in extents)
        self.revoked = False
        self.extents = extents
        self._pool = pool
        self._plan: list[tuple[int, Spot]] = []  # (bytes, spot), in the order of carving
        self._carved = 0  # tensors carved in the order of the plan; -1: the plan was left
        self._used = [0] * len(extents)

    def plan(self, tensors: Tensors) -> bool:
        """Place these tensors, to be carved next and in this order, from an empty lease (``reset`` comes with it).

        Returns:
            Whether they fit; where not, nothing has changed.
        """
        sizes = [carved_bytes(shape, dtype) for shape, dtype in tensors]
        spots = place([extent.numel() for extent in self.extents], sizes)
        if spots is None:
            return False
        self._plan = list(zip(sizes, spots, strict=True))
        self.reset()
        return True

    def carve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in this lease; contents undefined.

        Raises:
            MemoryError: no extent has room for it, or the lease was given back.
        """
        if self.revoked:
            raise MemoryError(f"lease {self.name!r} was given back: nothing can be carved from it")
        extent, start = self._spot(carved_bytes(shape, dtype))
        nbytes = math.prod(shape) * dtype.itemsize
        return self.extents[extent].narrow(0, start, nbytes).view(dtype).view(tuple(shape))

    def _spot(self, size: int) -> Spot:
        """Where the next tensor goes: as planned while the sizes are those of the plan, else into the extent that
        it fills best."""
        if 0 <= self._carved < len(self._plan) and self._plan[self._carved][0] == size:
            extent, start = self._plan[self._carved][1]
            self._carved += 1
        else:
            self._carved = -1
            rooms = [
                (e.numel() - used, i)
                for i, (e, used) in enumerate(zip(self.extents, self._used, strict=True))
            ]
            fitting = [(room, index) for room, index in rooms if room >= size]
            if not fitting:
                raise MemoryError(
                    f"no room for {size} bytes in lease {self.name!r}: of its {self.nbytes} bytes the "
                    f"largest free piece has {max(room for room, _ in rooms)}"
                )
            extent = min(fitting)[1]
            start = self._used[extent]
        self._used[extent] = max(self._used[extent], start + size)
        return extent, start

    def reset(self) -> None:
        """Forget all carved tensors (the caller holds none any more); the memory stays."""
        self._carved = 0
        self._used = [0] * len(self.extents)

    def give_back(self) -> None:
        """Return the memory to the KV cache; may be repeated."""
        if not self.revoked:
            self._pool.release(self)


class TrainArena:
    """Gives training its spaces; see ``peft_trainer.memory.interface.TrainMemory``."""

    def __init__(self, pool: UnifiedPool) -> None:
        self._pool = pool
        self._count = itertools.count(1)

    def obtain(self, purpose: MemoryPurpose, tensors: Tensors) -> Lease | None:
        """A lease in which these tensors can be carved in this order; None: not now."""
        geometry, pool = self._pool.geometry, self._pool
        sizes = [carved_bytes(shape, dtype) for shape, dtype in tensors]
        least = max(geometry.stripes_for(sum(sizes)), 1)

        def choose(free: Sequence[int], allowed: int) -> Sequence[int] | None:
            return _fewest_stripes(geometry, sizes, free, least, allowed)

        lease = pool.lease(
            purpose,
            f"{purpose}-{next(self._count)}",
            least,
            choose=None if pool.backing.contiguous else choose,
        )
        if lease is not None and not lease.plan(tensors):
            lease.give_back()  # the backing's extents are not those that were foreseen
            return None
        return lease

    def could_ever_obtain(self, tensors: Tensors) -> bool:
        """Whether these tensors fit when the KV cache uses nothing: all that can be lent, within the cap."""
        pool, geometry = self._pool, self._pool.geometry
        sizes = [carved_bytes(shape, dtype) for shape, dtype in tensors]
        least, most = max(geometry.stripes_for(sum(sizes)), 1), pool.quota.max_stripes
        if pool.backing.contiguous:
            return least <= most
        free = list(reversed(geometry.lendable))
        return _fewest_stripes(geometry, sizes, free, least, most) is not None


def _fewest_stripes(
    geometry: PoolGeometry, sizes: Sequence[int], free: Sequence[int], least: int, allowed: int
) -> Sequence[int] | None:
    """The fewest stripes whose separate extents hold tensors of these sizes: of the highest ones, or, where those are
    scattered too much, of the longest runs.  None: ``allowed`` stripes do not suffice."""
    if not sizes:
        return free[:least] if allowed >= least else None

    def suffice(stripes: Sequence[int]) -> bool:
        return place(separate_extents(geometry, stripes), sizes) is not None

    longest_first = sorted(runs_of(free), key=lambda run: (-len(run), -run.start))
    best: Sequence[int] | None = None
    for candidates in (free, [stripe for run in longest_first for stripe in reversed(run)]):
        high = min(allowed, len(candidates))  # suffices
        low = least - 1  # does not
        if high <= low or not suffice(candidates[:high]):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if suffice(candidates[:middle]) else (middle, high)
        if best is None or high < len(best):
            best = candidates[:high]
    return best

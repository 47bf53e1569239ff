"""How the pool is cut: slots, chunks and stripes. Pure arithmetic (docs/internals/memory.md).

    layer 0: | chunk | chunk | chunk | ... | tail |   | chunk | chunk | chunk | ... | tail |
              buffer 0: K                              buffer 1: V
      ...     stripe0 stripe1 stripe2                  stripe0 stripe1 stripe2

A stripe, the unit in which memory moves, is an aligned range of token slots: one chunk of each
buffer. Stripe 0 holds slot 0, where SGLang writes padded tokens, and the tail does not fill a
stripe: both stay with the KV cache for ever, so that its capacity is exactly SGLang's. K and V of a
layer lie in one range of addresses, V whole pages of SGLang's behind K: attention kernels that are
given one base address reach V by numbers of pages.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

LEAST_STRIPES = 64  # a small pool must be able to lend too
MANY_STRIPES = 128  # a large one takes larger chunks, while this many stripes are left
LARGEST_CHUNK = 2 * 2**20  # of a pool on a host, and of one on CUDA that leaves fewer than MANY_STRIPES
LARGEST_DEVICE_CHUNK = 8 * 2**20  # on CUDA: each chunk is a handle, and has to be mapped at the start


def runs_of(stripes: Iterable[int]) -> list[range]:
    """Runs of adjacent stripes, ascending: ``[5, 2, 3]`` is ``[range(2, 4), range(5, 6)]``."""
    runs: list[range] = []
    for stripe in sorted(stripes):
        if runs and runs[-1].stop == stripe:
            runs[-1] = range(runs[-1].start, stripe + 1)
        else:
            runs.append(range(stripe, stripe + 1))
    return runs


def fullest_window(
    lendable: range, lent: Container[int], free: Container[int], length: int, tried: Container[int]
) -> range | None:
    """Of ``length`` stripes in a row, none lent and not all free, those with the most free ones.

    Of equals the highest.  ``tried``: first stripes of windows that are left out.  None: there is
    none.
    """
    best, most = None, -1
    for start in reversed(range(lendable.start, lendable.stop - length + 1)):
        window = range(start, start + length)
        if start in tried or any(stripe in lent for stripe in window):
            continue
        count = sum(stripe in free for stripe in window)
        if most < count < length:
            best, most = window, count
    return best


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """One pool's cut.

    Attributes:
        slots: rows of each buffer, SGLang's padded page included (``size + page_size``).
        row_bytes: one slot in one buffer, alike in all; buffers: K and V of each layer in turn.
        page_size: SGLang's, in slots; stripe_slots: slots of a stripe, which holds whole pages.
    """

    slots: int
    row_bytes: int
    buffers: int
    page_size: int
    stripe_slots: int

    @classmethod
    def plan(
        cls, *, slots: int, row_bytes: int, buffers: int, page_size: int, granularity: int
    ) -> PoolGeometry:
        """The largest chunk (``LARGEST_CHUNK`` or one granule at most) leaving ``LEAST_STRIPES``.

        Where none does, the smallest that ``granularity`` allows: bytes in which the backing can
        move memory (the OS page, or 2 MiB on CUDA). With granules of ``LARGEST_CHUNK``, as on CUDA,
        the chunk then doubles up to ``LARGEST_DEVICE_CHUNK`` while ``MANY_STRIPES`` are left.
        """
        granule_slots = granularity // math.gcd(granularity, row_bytes)
        smallest = math.lcm(granule_slots, page_size)
        by_size = max(LARGEST_CHUNK // (smallest * row_bytes), 1)
        by_count = max(slots // (smallest * LEAST_STRIPES), 1)
        stripe_slots = smallest * min(by_size, by_count)
        if granularity >= LARGEST_CHUNK:
            while (
                2 * stripe_slots * row_bytes <= LARGEST_DEVICE_CHUNK
                and slots // (2 * stripe_slots) >= MANY_STRIPES
            ):
                stripe_slots *= 2
        return cls(slots, row_bytes, buffers, page_size, stripe_slots)

    @property
    def stripes(self) -> int:
        """Full stripes, stripe 0 included."""
        return self.slots // self.stripe_slots

    @property
    def lendable(self) -> range:
        """The stripes that may be lent."""
        return range(1, self.stripes)

    @property
    def chunk_bytes(self) -> int:
        return self.stripe_slots * self.row_bytes

    @property
    def stripe_bytes(self) -> int:
        return self.chunk_bytes * self.buffers

    @property
    def buffer_bytes(self) -> int:
        return self.slots * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """The budget: all buffers, of serving and training."""
        return self.buffer_bytes * self.buffers

    @property
    def stripe_pages(self) -> int:
        """Pages of SGLang's slot allocator in a stripe."""
        return self.stripe_slots // self.page_size

    @property
    def lendable_bytes(self) -> int:
        return len(self.lendable) * self.stripe_bytes

    def value_offset(self, granularity: int = 1) -> int:
        """Bytes from a layer's K to its V: one buffer, in whole pages of SGLang's and in multiples
        of ``granularity``."""
        unit = math.lcm(granularity, self.page_size * self.row_bytes)
        return -(-self.buffer_bytes // unit) * unit

    def slots_of(self, stripe: int) -> range:
        return range(stripe * self.stripe_slots, (stripe + 1) * self.stripe_slots)

    def stripes_for(self, nbytes: int) -> int:
        """Stripes that hold ``nbytes``."""
        return -(-nbytes // self.stripe_bytes)

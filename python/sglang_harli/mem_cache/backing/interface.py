"""What holds the pool's physical memory: one protocol, several ways (docs/internals/memory.md).

host      anonymous mmap; memory that is lent falls out of the KV region by madvise
aliased   CUDA virtual memory: each chunk is mapped in its KV place and in training's window, for ever
remapped  CUDA virtual memory: physical handles are mapped here or there
static    nothing is remapped: training gets the very bytes of the KV rows, as separate extents
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sglang_harli.mem_cache.geometry import PoolGeometry


class Backing(Protocol):
    """Physical memory of one pool.  Used from one thread."""

    name: str  # host, aliased, remapped, static
    contiguous: bool  # what is lent is always one extent; else there may be several (``extent_bytes``)
    geometry: PoolGeometry

    @property
    def lent(self) -> set[int]:
        """Stripes whose memory training has."""
        ...

    def kv_bytes(self, buffer: int) -> Tensor:
        """Buffer's bytes, uint8 ``[buffer_bytes]``; a fixed address and length, zero at first."""
        ...

    def extent_bytes(self, stripes: Sequence[int]) -> list[int]:
        """Bytes of each extent that ``lend`` of these stripes gives."""
        ...

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """Move stripes' memory from the KV cache to training; the caller uses none of their slots.

        What still runs on the device is ordered: writes of forwards to slots that were freed come
        before training's first write.

        Returns:
            Extents, uint8: one of ``len(stripes) * stripe_bytes`` where memory is remapped, one for
                each run of adjacent stripes where it is aliased, and for each run and buffer where
                it is lent in place. Contents: undefined; in debug mode NaN in every 16-, 32- and
                64-bit floating-point format.
        """
        ...

    def take_back(self, stripes: Sequence[int], extents: Sequence[Tensor]) -> None:
        """The reverse of one whole ``lend``. The KV rows hold zeros, ordered before any later
        forward; training uses the extents no more."""
        ...

    def settle(self) -> None:
        """Return when what was taken back holds its zeros: for who writes there on no stream.

        The host waits only where that is not over, and asks the device only where something was
        taken back since the last time."""
        ...

    def resident_bytes(self) -> int:
        """Physical memory that the pool's regions hold now (the host asks the kernel)."""
        ...

    def close(self) -> None:
        """Return everything; the tensors handed out must not be used any more."""
        ...

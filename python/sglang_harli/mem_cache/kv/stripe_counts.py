"""How many free pages each stripe has, as the host knows it, without ever waiting for the device.

SGLang's free list is a tensor on the device. While it is sorted and only its head is taken, two
positions per stripe say everything: where its pages begin in the list and where they end. One
search on the device finds them; they are copied to the host and read when they are there (on a
device one step late). From then on the host computes which stripes the allocations hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of

Ready = Callable[[], bool]  # whether what was copied has arrived; never waits
Fence = Callable[[], Ready]  # called behind the copies


def event_fence(device: torch.device) -> Fence | None:
    """Tells when copies to the host have arrived; None where they are there at once (a host)."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)

    def record() -> Ready:
        event = module.Event()
        event.record()
        return event.query

    return record


class StripeCounts:
    """Positions of the stripes' pages in one sorted free list.

    Valid from ``start`` until the list changes in another way than by taking its head or by
    ``cut``; code that does so calls ``forget``. Pages are numbered as the pool's slots are, page 0
    is the padded one. ``fence``: None reads at once; else as in ``event_fence``.
    """

    def __init__(self, geometry: PoolGeometry, device: torch.device, fence: Fence | None = None) -> None:
        self.geometry = geometry
        self._device, self.fence = device, fence
        self._edges: Tensor | None = None  # first page of each stripe, and of what follows the last
        self._host: Tensor | None = None
        self._ready: Ready | None = None
        self._starts: list[int] | None = None  # [stripes + 1] positions in the list that was counted
        self._length = 0  # of that list; what was taken since is the difference

    def start(self, free_pages: Tensor) -> None:
        """Count a sorted list (int64, no page twice).  Ends an earlier count."""
        found = torch.searchsorted(free_pages, self._edge_pages())
        self._length, self._starts = len(free_pages), None
        if self.fence is None:
            self._starts = found.tolist()
            return
        if self._host is None:
            self._host = torch.empty(len(found), dtype=torch.int64, pin_memory=found.is_cuda)
        self._host.copy_(found, non_blocking=True)
        self._ready = self.fence()

    def forget(self) -> None:
        """The list was merged, rebuilt or restored."""
        self._starts = self._ready = None

    @property
    def pending(self) -> bool:
        """Whether a count is on its way."""
        return self._ready is not None

    def known(self) -> bool:
        """Whether the counts are here; takes them in when they have just arrived."""
        if self._ready is not None and self._ready():
            assert self._host is not None
            self._starts, self._ready = self._host.tolist(), None
        return self._starts is not None

    def free_pages(self, length: int) -> list[int]:
        """Free pages of each stripe: what was counted, less what left the head; ``length``: now."""
        assert self._starts is not None, "counts are asked for only when they are known"
        taken = self._length - length
        ends = self._starts[1:]
        return [max(end - max(start, taken), 0) for start, end in zip(self._starts[:-1], ends, strict=True)]

    def wholly_free(self, length: int) -> list[int]:
        """Lendable stripes with all their pages in the list, highest first."""
        free, whole = self.free_pages(length), self.geometry.stripe_pages
        return [stripe for stripe in reversed(self.geometry.lendable) if free[stripe] == whole]

    def cut(self, stripes: Iterable[int], length: int) -> list[slice]:
        """What of the list remains without these wholly free stripes' pages; the counts follow.

        Raises:
            ValueError: a stripe is not known to be wholly free.
        """
        wanted = set(stripes)
        missing = wanted - set(self.wholly_free(length) if self.known() else ())
        if missing:
            raise ValueError(
                f"stripes {sorted(missing)} are not known to be free: ask for the free ones first"
            )
        assert self._starts is not None
        taken, pages = self._length - length, self.geometry.stripe_pages
        kept, position = list[slice](), 0
        for run in runs_of(wanted):
            start = self._starts[run.start] - taken
            kept.append(slice(position, start))
            position = start + len(run) * pages
        kept.append(slice(position, length))
        gone, below = 0, list[int]()
        for stripe, start in enumerate(self._starts):
            below.append(start - gone)
            gone += pages if stripe in wanted else 0
        self._starts, self._length = below, self._length - gone
        return kept

    def _edge_pages(self) -> Tensor:
        if self._edges is None:
            stop = (self.geometry.stripes + 1) * self.geometry.stripe_pages
            self._edges = torch.arange(
                0, stop, self.geometry.stripe_pages, dtype=torch.int64, device=self._device
            )
        return self._edges

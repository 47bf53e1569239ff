"""SGLang's two slot allocators over the unified pool: what is lent still counts as available.

A lease is revocable at any allocation, so ``available_size`` counts the slots behind it, and
admission, decode growth, retraction, the checkers and the load report decide as on plain SGLang. An
allocation that finds too little takes it back before it answers. Requests get other slots than on
plain SGLang (low ones first, so that high stripes drain); what is computed is the same: attention
reads the same rows through the same table, so greedy decisions are equal.

Leans on SGLang: ``mem_cache.allocator`` (``free_pages`` and ``need_sort``: frees wait elsewhere,
``sglang_versions.*.slots``, and are merged and sorted when ``free_pages`` is too short).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import BaseTokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages
from torch import Tensor

from sglang_harli.mem_cache.geometry import runs_of
from sglang_harli.mem_cache.kv.stripe_counts import Fence, StripeCounts, event_fence
from sglang_harli.mem_cache.unified_pool import SlotSource, UnifiedPool
from sglang_harli.sglang_versions.current import slots

MakePool = Callable[[SlotSource], UnifiedPool]


class StripedFreeList(BaseTokenToKVPoolAllocator):
    """The pages of a slot allocator, and its lent stripes (``unified_pool.SlotSource``).

    ``free_pages`` is sorted ascending and taken from its head; what was freed since waits beside
    it. Before one of ``slots``' classes in the bases.
    """

    free_pages: Tensor
    waiting_pages: Callable[[], int]
    put_back: Callable[..., None]
    prefix_scan: Any = None  # of prefix_eviction: a look at the prefix cache whose figures are on their way

    def _prepare(self, make_pool: MakePool, device: str | torch.device, fence: Fence | None) -> None:
        """Before SGLang's constructor, which calls ``clear``."""
        self.pool = make_pool(self)
        at = torch.device(device)
        self.counts = StripeCounts(self.pool.geometry, at, fence or event_fence(at))
        self.lent_stripes: set[int] = set()
        self._offered = False  # the counts were used: next time newer frees are counted in

    @property
    def lent_pages(self) -> int:
        return len(self.lent_stripes) * self.pool.geometry.stripe_pages

    # ------------------------------------------------------------------ SGLang's side
    def available_size(self) -> int:
        """Slots that requests may count on: free ones, and those that training holds on call."""
        return super().available_size() + self.lent_pages * self.page_size

    def merge_and_sort_free(self) -> None:
        if self.waiting_pages():
            self.counts.forget()
        super().merge_and_sort_free()

    def clear(self) -> None:
        """Everything is free but what is lent; the rest is SGLang's (page 0 is the padded one)."""
        self.counts.forget()
        self.prefix_scan = None
        super().clear()  # type: ignore[safe-super]  # gives pages 1, 2, ... in order
        pages, kept, start = self.pool.geometry.stripe_pages, list[Tensor](), 0
        for run in runs_of(self.lent_stripes):
            kept.append(self.free_pages[start : run.start * pages - 1])
            start = run.stop * pages - 1
        if kept:
            self.free_pages = torch.cat([*kept, self.free_pages[start:]])

    def _make_room(self, pages: int) -> None:
        """Get ``pages`` into ``free_pages``, from training where its lent ones suffice."""
        self.merge_and_sort_free()
        missing = pages - len(self.free_pages)
        if 0 < missing <= self.lent_pages:
            self.pool.reclaim(missing * self.page_size)
            self.merge_and_sort_free()

    # ------------------------------------------------------------------ the pool's side
    def free_stripes(self) -> list[int]:
        """Lendable stripes known to be wholly free, highest first.

        Called when training asks for memory, never per step: it merges and sorts newly freed pages.
        On a device their counts come one call later; what is known is offered once before.
        """
        if not self.count_stripes():
            return []
        self._offered = True
        return self.counts.wholly_free(len(self.free_pages))

    def count_stripes(self) -> bool:
        """Whether the counts are known and as new as they can be; else starts a count."""
        stale = self.waiting_pages() > 0 and (self._offered or self.counts.fence is None)
        if (stale or not self.counts.known()) and not self.counts.pending:
            self.merge_and_sort_free()
            self.counts.start(self.free_pages)
            self._offered = False
        return self.counts.known()

    def stripe_free_pages(self) -> list[int] | None:
        """Free pages of each stripe, if known; without those freed since the last count."""
        return self.counts.free_pages(len(self.free_pages)) if self.counts.known() else None

    def withdraw(self, stripes: Sequence[int]) -> None:
        """Take stripes that ``free_stripes`` has just named out of the free list.

        Raises:
            ValueError: one is not known to be free.
        """
        kept = self.counts.cut(stripes, len(self.free_pages))
        self.free_pages = torch.cat([self.free_pages[part] for part in kept])
        self.lent_stripes.update(stripes)

    def restore(self, stripes: Sequence[int]) -> None:
        """The slots of lent stripes are free again.

        Raises:
            ValueError: one was not lent.
        """
        if stray := set(stripes) - self.lent_stripes:
            raise ValueError(f"stripes {sorted(stray)} are not lent: the pool gives each back once")
        self.put_back(*self.pages_of(stripes))
        self.lent_stripes.difference_update(stripes)

    # ------------------------------------------------------------------ helpers
    def pages_of(self, stripes: Iterable[int]) -> list[Tensor]:
        """The pages of each run of adjacent stripes."""
        pages = self.pool.geometry.stripe_pages
        return [self._range(run.start * pages, run.stop * pages) for run in runs_of(stripes)]

    def _range(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int64, device=self.device)


class HarliTokenAllocator(StripedFreeList, slots.TokenSlots):
    """``TokenToKVPoolAllocator`` (page size 1) over the unified pool.

    Args:
        size: slots, the padded one not counted.
        make_pool: makes the unified pool whose stripes the slots belong to, given this allocator.
        fence: see ``stripe_counts``; None: by the device.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: Any,
        make_pool: MakePool,
        fence: Fence | None = None,
    ) -> None:
        self._prepare(make_pool, device, fence)
        super().__init__(size, dtype, device, kvcache, need_sort=True)

    def alloc(self, need_size: int) -> Tensor | None:
        if need_size > len(self.free_pages):
            self._make_room(need_size)
        return super().alloc(need_size)


class HarliPagedAllocator(StripedFreeList, slots.PagedSlots):
    """``PagedTokenToKVPoolAllocator``; see ``HarliTokenAllocator``."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: Any,
        make_pool: MakePool,
        fence: Fence | None = None,
    ) -> None:
        self._prepare(make_pool, device, fence)
        super().__init__(size, page_size, dtype, device, kvcache, need_sort=True)

    def alloc(self, need_size: int) -> Tensor | None:
        if need_size // self.page_size > len(self.free_pages):
            self._make_room(need_size // self.page_size)
        return super().alloc(need_size)

    def alloc_extend(
        self,
        prefix_lens: Tensor,
        prefix_lens_cpu: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor,
        last_loc: Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> Tensor | None:
        """Slots of each request's ``[prefix, seq)``: the rest of its last page, then new ones."""
        if num_new_pages is None:
            num_new_pages = int(
                get_num_new_pages(
                    seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
                )
            )
        if num_new_pages > len(self.free_pages):
            self._make_room(num_new_pages)
            if num_new_pages > len(self.free_pages):
                return None  # before a kernel would read past the list
        return super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages,
        )

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        """One slot for each request; ``seq_lens`` counts the new token."""
        if len(seq_lens) > len(self.free_pages):  # each may need a page
            pages = int(get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True))
            if pages > len(self.free_pages):
                self._make_room(pages)
                if pages > len(self.free_pages):
                    return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)

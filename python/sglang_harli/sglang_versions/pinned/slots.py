"""SGLang's slot allocators on 0.5.16, and where their freed pages wait until they are sorted in.

Leans on SGLang: ``mem_cache.allocator`` (``release_pages``; ``backup_state`` and ``restore_state``;
the paged one allocates by Triton kernels alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages
from torch import Tensor

# Both lists and the stripes that were lent then.
_State = tuple[Tensor, Tensor, frozenset[int]]


class _Slots:
    """What both have; before SGLang's class in the bases."""

    free_pages: Tensor
    release_pages: Tensor
    lent_stripes: set[int]
    counts: Any
    pages_of: Callable[[Iterable[int]], list[Tensor]]

    def waiting_pages(self) -> int:
        """Freed pages that are not in ``free_pages`` yet."""
        return len(self.release_pages)

    def put_back(self, *pages: Tensor) -> None:
        """These pages are free too; they wait as freed ones do."""
        self.release_pages = torch.cat((self.release_pages, *pages))

    def backup_state(self) -> _State:
        return (self.free_pages, self.release_pages, frozenset(self.lent_stripes))

    def restore_state(self, state: _State) -> None:
        """Undo allocations; leases taken or given back in between stay as they are now. Waits for
        the device if there were any."""
        self.free_pages, self.release_pages, lent = state
        self.counts.forget()
        if taken := self.lent_stripes - lent:
            gone = torch.cat(self.pages_of(taken))
            self.free_pages = self.free_pages[~torch.isin(self.free_pages, gone)]
            self.release_pages = self.release_pages[~torch.isin(self.release_pages, gone)]
        if returned := lent - self.lent_stripes:
            self.put_back(*self.pages_of(returned))


class TokenSlots(_Slots, TokenToKVPoolAllocator):
    """Slots one by one."""


class PagedSlots(_Slots, PagedTokenToKVPoolAllocator):
    """Slots in pages, also on a host without Triton. ``free_pages`` must hold the new pages."""

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
        if torch.device(self.device).type != "cpu":
            return super().alloc_extend(
                prefix_lens,
                prefix_lens_cpu,
                seq_lens,
                seq_lens_cpu,
                last_loc,
                extend_num_tokens,
                num_new_pages,  # type: ignore[arg-type]
            )
        return self._extend_on_host(prefix_lens, seq_lens, last_loc, extend_num_tokens, num_new_pages)

    def alloc_decode(self, seq_lens: Tensor, seq_lens_cpu: Tensor, last_loc: Tensor) -> Tensor | None:
        if torch.device(self.device).type != "cpu":
            return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        return self._extend_on_host(seq_lens - 1, seq_lens, last_loc, len(seq_lens), int(pages))

    def _extend_on_host(
        self, prefix_lens: Tensor, seq_lens: Tensor, last_loc: Tensor, total: int, new_pages: Any
    ) -> Tensor:
        """What SGLang's Triton kernel computes (``kernels/ops/memory/allocator.py``), in torch.

        Returns int64 ``[total]``, request by request.
        """
        page = self.page_size
        first_new = (prefix_lens + page - 1) // page  # index of each request's first new page, among its own
        news = (seq_lens + page - 1) // page - first_new
        lens = seq_lens - prefix_lens
        # Positions of each request's tokens in its sequence.
        owner = torch.repeat_interleave(torch.arange(len(lens)), lens, output_size=total)
        position = torch.arange(total) - (torch.cumsum(lens, 0) - lens - prefix_lens)[owner]
        begun = position < (first_new * page)[owner]  # these go on in the page that the request has
        taken = self.free_pages[:new_pages]
        slot = last_loc.to(torch.int64)[owner] + 1 + position - prefix_lens[owner]
        number = (torch.cumsum(news, 0) - news - first_new)[owner] + position // page
        fresh = ~begun
        slot[fresh] = taken[number[fresh]] * page + position[fresh] % page
        self.free_pages = self.free_pages[new_pages:]
        return slot

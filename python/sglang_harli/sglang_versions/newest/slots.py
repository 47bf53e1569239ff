"""SGLang's slot allocators on 0.5.23, and where their freed pages wait until they are sorted in.

Leans on SGLang: ``mem_cache.allocator`` (``release_pages`` where a page is a slot, else
``staged_pages`` and ``num_staged_pages``: every kind of free ends there, a free group's at its
end).
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from torch import Tensor


class TokenSlots(TokenToKVPoolAllocator):
    """Slots one by one."""

    release_pages: Tensor

    def waiting_pages(self) -> int:
        """Freed pages that are not in ``free_pages`` yet."""
        return len(self.release_pages)

    def put_back(self, *pages: Tensor) -> None:
        """These pages are free too; they wait as freed ones do."""
        self.release_pages = torch.cat((self.release_pages, *pages))


class PagedSlots(PagedTokenToKVPoolAllocator):
    """Slots in pages."""

    def waiting_pages(self) -> int:
        """Freed pages that are not in ``free_pages`` yet."""
        return self.num_staged_pages

    def put_back(self, *pages: Tensor) -> None:
        """These pages are free too; they wait as freed ones do."""
        self._release_page_ids(*pages)

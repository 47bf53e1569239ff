"""A pool of memory with SGLang's slot allocator and a real radix tree over it, without a model."""

from __future__ import annotations

import functools
import itertools
import time
from array import array
from typing import Any

import torch

from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.unified_pool import UnifiedPool

STRIPE = 8  # pages
SEEDS = itertools.count(1_000_000)  # token ids that no other entry has


class PrefixCacheUnderTest:
    """A pool with its allocator and a radix tree over it."""

    def __init__(
        self,
        stripes: int = 10,
        page: int = 1,
        fence: Any = None,
        policy: str = "lru",
        clock: Any = time.monotonic,
    ) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        from sglang_harli.mem_cache.kv.slot_allocator import HarliPagedAllocator, HarliTokenAllocator

        self.page, self.size = page, (stripes * STRIPE - 1) * page
        geometry = PoolGeometry(self.size + page, 512, 2, page, STRIPE * page)
        make_pool = functools.partial(UnifiedPool, geometry, HostBacking(geometry), clock=clock)
        self.slots: Any
        if page == 1:
            self.slots = HarliTokenAllocator(self.size, torch.float32, "cpu", None, make_pool, fence)
        else:
            self.slots = HarliPagedAllocator(self.size, page, torch.float32, "cpu", None, make_pool, fence)
        self.pool: UnifiedPool = self.slots.pool
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=None,  # type: ignore[arg-type]
            token_to_kv_pool_allocator=self.slots,
            page_size=page,
            eviction_policy=policy,
            enable_kv_cache_events=True,
        )
        self.tree = RadixCache(params)
        self.held = 0  # slots of requests

    def cache(self, pages: int, after: list[int] | None = None) -> list[int]:
        """Cache a prefix of so many new pages behind another one; its token ids."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        before = list(after or [])
        tokens = before + [next(SEEDS) for _ in range(pages * self.page)]
        slots = self.slots.alloc(len(tokens))
        if slots is None:
            return before
        found = self.tree.insert(InsertParams(key=RadixKey(array("q", tokens)), value=slots)).prefix_len
        self.slots.free(slots[:found])
        return tokens

    def node(self, tokens: list[int]) -> Any:
        """The last entry of a prefix; looking refreshes it, as a request would."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)))).last_device_node

    def cached(self, tokens: list[int]) -> int:
        """How many of these tokens are cached, without a look."""
        node, left = self.tree.root_node, tokens
        while left:
            key = next((k for k in node.children if k in (left[0], tuple(left[: self.page]))), None)
            if key is None:
                break
            node = node.children[key]
            left = left[len(node.key) :]
        return len(tokens) - len(left)

    def evict(self, wanted: int, keep: int = 0, unused_since_s: float | None = None) -> int:
        from sglang_harli.mem_cache.kv.prefix_eviction import evict_stripes

        return evict_stripes(self.tree, self.slots, wanted, keep, unused_since_s)

    def age(self, tokens: list[int], by_s: float) -> None:
        """The entries of a prefix were last used so much earlier."""
        node = self.node(tokens)
        while node is not self.tree.root_node:
            node.last_access_time -= by_s
            node = node.parent

    def use(self, pages: int) -> torch.Tensor | None:
        """A request's slots."""
        slots = self.slots.alloc(pages * self.page)
        self.held += 0 if slots is None else len(slots)
        return slots

    def check(self) -> None:
        """SGLang's own equation, and the tree's books."""
        tree = self.tree
        total = self.slots.available_size() + tree.evictable_size() + tree.protected_size() + self.held
        assert total == self.size
        nodes, stack = [], [tree.root_node]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            nodes += [] if node is tree.root_node else [node]
        assert sum(len(n.value) for n in nodes if n.lock_ref == 0) == tree.evictable_size()
        assert sum(len(n.value) for n in nodes if n.lock_ref) == tree.protected_size()
        assert tree.evictable_leaves - {tree.root_node} == {
            n for n in nodes if not n.children and not n.lock_ref
        }
        values = [slot for n in nodes for slot in n.value.tolist()]
        free = torch.cat((self.slots.free_pages, self.slots.release_pages)).tolist()
        assert not {slot // self.page for slot in values} & set(free) and len(values) == len(set(values))

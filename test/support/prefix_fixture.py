"""A pool of memory with SGLang's slot allocator and a real prefix cache over it, without a
model."""

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
from support.model_runner import NEWEST
from support.pool_parts import all_free_pages

STRIPE = 8  # pages
SEEDS = itertools.count(1_000_000)  # token ids that no other entry has
# The trees that SGLang has: the first is its default.
KINDS = ("rust", "python") if NEWEST else ("radix",)


def under_test(*args: Any, **options: Any) -> PrefixCacheUnderTest:
    """One for the installed SGLang."""
    return (UnifiedCacheUnderTest if NEWEST else RadixCacheUnderTest)(*args, **options)


class PrefixCacheUnderTest:
    """A pool with its allocator and SGLang's default prefix cache over it."""

    tree: Any

    def __init__(
        self,
        stripes: int = 10,
        page: int = 1,
        fence: Any = None,
        policy: str = "lru",
        clock: Any = time.monotonic,
        kind: str = KINDS[0],
        watched: bool = True,
    ) -> None:
        from sglang_harli.mem_cache.kv.slot_allocator import HarliPagedAllocator, HarliTokenAllocator
        from sglang_harli.sglang_versions.current import prefix_tree

        self.page, self.size = page, (stripes * STRIPE - 1) * page
        geometry = PoolGeometry(self.size + page, 512, 2, page, STRIPE * page)
        make_pool = functools.partial(UnifiedPool, geometry, HostBacking(geometry), clock=clock)
        self.slots: Any
        if page == 1:
            self.slots = HarliTokenAllocator(self.size, torch.float32, "cpu", None, make_pool, fence)
        else:
            self.slots = HarliPagedAllocator(self.size, page, torch.float32, "cpu", None, make_pool, fence)
        self.pool: UnifiedPool = self.slots.pool
        self.held = 0  # slots of requests
        self._make_tree(policy, kind)
        if watched:
            prefix_tree.watch(self.tree)

    def _params(self, policy: str, **more: Any) -> Any:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        return CacheInitParams(
            disable=False,
            req_to_token_pool=None,  # type: ignore[arg-type]
            token_to_kv_pool_allocator=self.slots,
            page_size=self.page,
            eviction_policy=policy,
            enable_kv_cache_events=True,
            **more,
        )

    def _make_tree(self, policy: str, kind: str) -> None:
        raise NotImplementedError

    def cache(self, pages: int, after: list[int] | None = None) -> list[int]:
        """Cache a prefix of so many new pages behind another one; its token ids."""
        before = list(after or [])
        tokens = before + [next(SEEDS) for _ in range(pages * self.page)]
        slots = self.slots.alloc(len(tokens))
        if slots is None:
            return before
        self._insert(tokens, slots)
        return tokens

    def _insert(self, tokens: list[int], slots: torch.Tensor) -> int:
        """How many of the tokens were cached already."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return self.tree.insert(InsertParams(key=RadixKey(array("q", tokens)), value=slots)).prefix_len

    def node(self, tokens: list[int]) -> Any:
        """The last entry of a prefix; looking refreshes it, as a request would."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)))).last_device_node

    def cached(self, tokens: list[int]) -> int:
        """How many of these tokens are cached, without a look."""
        raise NotImplementedError

    def lock(self, tokens: list[int]) -> None:
        """As a request that uses the prefix does."""
        raise NotImplementedError

    def unlock(self, tokens: list[int]) -> None:
        raise NotImplementedError

    def evict(self, wanted: int, keep: int = 0, unused_since_s: float | None = None) -> int:
        from sglang_harli.mem_cache.kv.prefix_eviction import evict_stripes

        return evict_stripes(self.tree, self.slots, wanted, keep, unused_since_s)

    def age(self, tokens: list[int], by_s: float) -> None:
        """The entries of a prefix were last used so much earlier."""
        raise NotImplementedError

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
        values = self._check_tree()
        free = all_free_pages(self.slots)
        assert not {slot // self.page for slot in values} & set(free) and len(values) == len(set(values))

    def _check_tree(self) -> list[int]:
        """The slots of all entries."""
        raise NotImplementedError


class RadixCacheUnderTest(PrefixCacheUnderTest):
    """SGLang 0.5.16."""

    def _make_tree(self, policy: str, kind: str) -> None:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.tree = RadixCache(self._params(policy))

    def _insert(self, tokens: list[int], slots: torch.Tensor) -> int:
        found = super()._insert(tokens, slots)
        self.slots.free(slots[:found])
        return found

    def cached(self, tokens: list[int]) -> int:
        node, left = self.tree.root_node, tokens
        while left:
            key = next((k for k in node.children if k in (left[0], tuple(left[: self.page]))), None)
            if key is None:
                break
            node = node.children[key]
            left = left[len(node.key) :]
        return len(tokens) - len(left)

    def lock(self, tokens: list[int]) -> None:
        self.tree.inc_lock_ref(self.node(tokens))

    def unlock(self, tokens: list[int]) -> None:
        self.tree.dec_lock_ref(self.node(tokens))

    def age(self, tokens: list[int], by_s: float) -> None:
        node = self.node(tokens)
        while node is not self.tree.root_node:
            node.last_access_time -= by_s
            node = node.parent

    def _check_tree(self) -> list[int]:
        tree = self.tree
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
        return [slot for n in nodes for slot in n.value.tolist()]


class UnifiedCacheUnderTest(PrefixCacheUnderTest):
    """SGLang 0.5.23, over its tree in Rust or in Python."""

    def _make_tree(self, policy: str, kind: str) -> None:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.tree = UnifiedRadixCache(
            self._params(policy, tree_components=(ComponentType.FULL,), tree_core_backend=kind)
        )
        assert kind in type(self.tree.tree_core).__name__.lower() or kind == "python"
        self.locks: dict[tuple[int, ...], Any] = {}

    def _match(self, tokens: list[int]) -> tuple[int, int]:
        """(tokens found, entry), and no entry is used by it."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        found, node, _ = self.tree.tree_core.match_full_device_prefix(RadixKey(array("q", tokens)))
        return found, node

    def cached(self, tokens: list[int]) -> int:
        return self._match(tokens)[0]

    def lock(self, tokens: list[int]) -> None:
        self.locks[tuple(tokens)] = self.tree.inc_lock_ref(self.node(tokens)).to_dec_params()

    def unlock(self, tokens: list[int]) -> None:
        params = self.locks.pop(tuple(tokens))
        self.tree.dec_lock_ref(params.node_id, params)

    def age(self, tokens: list[int], by_s: float) -> None:
        core = self.tree.tree_core
        uses = core.harli_uses
        for node in core.collect_path_info([self._match(tokens)[1]])[0]:
            used_s = uses._last[node.node_id] = uses.used_s(node.node_id) - by_s
            uses._before_s = min(uses._before_s, used_s)

    def _check_tree(self) -> list[int]:
        self.tree.sanity_check()
        return self.tree.all_values_flatten().tolist()

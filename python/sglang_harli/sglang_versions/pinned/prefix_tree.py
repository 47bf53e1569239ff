"""The prefix cache on SGLang 0.5.16: ``RadixCache``, whose entries are Python objects.

Of a long entry only the end need go: it is cut in two first, as SGLang does when a prompt matches a
part of it. Leans on SGLang: ``mem_cache.radix_cache`` (``evict``, whose bookkeeping this repeats)
and ``session.streaming_session`` (which wraps a cache).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.session.streaming_session import StreamingSession
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One that may go, as it was when it was found.

    Attributes:
        key, parent: the node and the one above it; value: its slots, by identity.
    """

    key: Any
    parent: Any
    value: Tensor


def watch(tree_cache: Any) -> None:
    """Know from now on when entries are used: the tree keeps that itself."""


def of(tree_cache: Any) -> PrefixTree | None:
    """The scheduler's cache, if entries of its kind can be chosen and evicted."""
    tree: Any = tree_cache.inner if isinstance(tree_cache, StreamingSession) else tree_cache  # type: ignore[attr-defined]
    if type(tree) is not RadixCache or tree.disable:  # subclasses keep entries elsewhere too
        return None
    return PrefixTree(tree)


class PrefixTree:
    """A ``RadixCache``, by its unlocked entries."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self.generation = tree.root_node  # a flush makes a new one

    def cached(self) -> int:
        """Tokens, those of locked entries included."""
        return self._tree.evictable_size() + self._tree.protected_size()

    def expendable(self, tokens: int, piece: int, most: int, unused_since_s: float | None) -> list[Entry]:
        """Entries in SGLang's order of eviction, as long as ``tokens`` hold them or they are
        unused.

        Each comes after all that hangs below it. ``piece``: tokens; a longer entry's end is cut
        off. ``most``: entries.
        """
        tree = self._tree
        priority = tree.eviction_strategy.get_priority
        heap: list[Any] = [
            (priority(node), node.id, node)
            for node in tree.evictable_leaves
            if tokens > 0 or _unused(node, unused_since_s)
        ]
        heapq.heapify(heap)
        found: list[Any] = []
        remaining: dict[Any, int] = {}  # children that are not in `found` yet
        while heap and len(found) < most:
            _, _, node = heapq.heappop(heap)
            room = piece if _unused(node, unused_since_s) else min(tokens, piece)
            longest = room // tree.page_size * tree.page_size
            if longest <= 0:
                break
            if len(node.key) > longest:
                self._cut(node, len(node.key) - longest)
            tokens -= len(node.key)
            found.append(node)
            parent = node.parent
            remaining[parent] = remaining.get(parent, len(parent.children)) - 1
            if remaining[parent] == 0 and parent.lock_ref == 0 and parent is not tree.root_node:
                heapq.heappush(heap, (priority(parent), parent.id, parent))
        return [Entry(node, node.parent, node.value) for node in found]

    def _cut(self, node: Any, length: int) -> None:
        """Put an entry's first ``length`` tokens into one of the same age above it."""
        head = self._tree._split_node(node.key, node, length)
        head.last_access_time, head.creation_time = node.last_access_time, node.creation_time

    def unused_tokens(self, entries: Sequence[Entry], since_s: float | None) -> int:
        """Tokens of those that no request has used since then."""
        return sum(len(entry.value) for entry in entries if _unused(entry.key, since_s))

    def alive(self, entries: Sequence[Entry]) -> np.ndarray:
        """bool ``[entries]``: one as it was, with nothing below it but entries that may go."""
        alive = np.zeros(len(entries), dtype=bool)
        seen: set[Any] = set()
        for index, entry in enumerate(entries):
            node = entry.key
            here = node.parent.children.get(node.key.child_key(self._tree.page_size)) is node
            if (
                here
                and node.lock_ref == 0
                and node.value is entry.value
                and seen.issuperset(node.children.values())
            ):
                alive[index] = True
                seen.add(node)
        return alive

    def evict(self, entries: Sequence[Entry]) -> None:
        """As ``RadixCache.evict`` does it; children come before their parents."""
        tree, began = self._tree, time.perf_counter()
        tree.token_to_kv_pool_allocator.free(torch.cat([entry.value for entry in entries]))
        for entry in entries:
            tree._delete_leaf(entry.key)
            tree._record_remove_event(entry.key)
        tree.update_eviction_metrics(sum(len(entry.value) for entry in entries), began)


def _unused(node: Any, since_s: float | None) -> bool:
    return since_s is not None and node.last_access_time < since_s

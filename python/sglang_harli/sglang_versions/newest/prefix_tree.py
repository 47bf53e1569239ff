"""The prefix cache on SGLang 0.5.23: ``UnifiedRadixCache``, over a tree in Rust or in Python.

Both trees are asked through their one interface, by numbers of entries. Its walk of eviction names
the entries that hang lowest in SGLang's order, and evicts none until it is asked to; what lies
above them comes from their paths, and whether that is locked from what a lock of our own would add.
When an entry was last used no tree tells, so each match and insertion is noted as it is made. The
Rust tree cannot be asked to cut an entry in two, so entries go whole.

Leans on SGLang: ``mem_cache.unified_radix_cache`` (``_evict_device_leaf``) and
``unified_cache.unified_tree_core_interface``.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from torch import Tensor

_FULL = ComponentType.FULL
_MOST_USES = 2**16  # that are remembered
_MOST_NODES = 2**12  # on the paths of one look
_EVERYTHING = 2**60  # tokens that a walk may evict: it is ended long before


@dataclass(frozen=True)
class Entry:
    """One that may go, as it was when it was found.

    Attributes:
        key, parent: the tree's numbers of it and of the one above; value: its slots.
    """

    key: int
    parent: int
    value: Tensor


class _Uses:
    """When each entry was last the end of a match or of an insertion, and when it was made.

    A use of an entry is also one of all its ancestors, which a look reads from the entries below.
    When SGLang evicts an entry, its parent is not known here. Under LRU the least recently used
    goes first, so no entry that stays was last used before the one evicted: that time is a lower
    bound for all. Under other policies entries that stay count as used at that time.
    """

    def __init__(self) -> None:
        self._last: dict[int, float] = {}  # the latest at the end
        self._before_s = time.monotonic()  # no entry counts as used before
        # Numbers ascend, and of the entries that one call makes its end has the highest.
        self._made: list[tuple[int, float]] = [(-1, self._before_s)]
        self.evicting = False  # True during our own eviction, which does not follow SGLang's order

    def note(self, node: int) -> None:
        now_s = time.monotonic()
        self._last.pop(node, None)
        self._last[node] = now_s
        if node > self._made[-1][0]:
            self._made.append((node, now_s))
            if len(self._made) > _MOST_USES:
                del self._made[: _MOST_USES // 2]
        self._forget_oldest()

    def inherit(self, node: int, below: int) -> None:
        """What hung below it was used as well, and is gone."""
        self._last[node] = max(self.used_s(node), self.used_s(below))
        self._last.pop(below, None)
        self._forget_oldest()

    def evicted(self, node: int) -> None:
        """SGLang's own eviction has removed this entry."""
        if not self.evicting:
            self._before_s = max(self._before_s, self._last.pop(node, 0.0))

    def _forget_oldest(self) -> None:
        if len(self._last) > _MOST_USES:
            self._before_s = max(self._before_s, self._last.pop(next(iter(self._last))))

    def made_s(self, node: int) -> float | None:
        """None: longer ago than is remembered."""
        at = bisect_left(self._made, (node,))
        return self._made[at][1] if 0 < at < len(self._made) else None

    def used_s(self, node: int) -> float:
        return max(self._last.get(node, 0.0), self._before_s)


def watch(tree_cache: Any) -> None:
    """Know from now on when entries are used; may be repeated."""
    core = getattr(tree_cache, "tree_core", None)
    if core is None or hasattr(core, "harli_uses"):
        return
    uses = core.harli_uses = _Uses()

    def noting(call: Callable[..., Any], end: Callable[[Any], int | None]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            node = end(result)
            if node is not None:
                uses.note(node)
            return result

        return noted

    def inserted(step: Any) -> int | None:
        return None if step.result is None else step.result.last_device_node

    core.match_prefix = noting(core.match_prefix, lambda result: result.last_device_node)
    core.begin_insert = noting(core.begin_insert, inserted)
    core.resume_insert = noting(core.resume_insert, inserted)
    evict = core.evict_device_leaf

    def evicting(node: int, *args: Any, **kwargs: Any) -> Any:
        result = evict(node, *args, **kwargs)
        uses.evicted(node)
        return result

    core.evict_device_leaf = evicting


def of(tree_cache: Any) -> PrefixTree | None:
    """The scheduler's cache, if entries of its kind can be chosen and evicted."""
    if type(tree_cache) is not UnifiedRadixCache or tree_cache.disable:  # subclasses keep entries elsewhere
        return None
    several = tree_cache.tree_components != (_FULL,)
    if several or tree_cache.cache_controller is not None or tree_cache.linker is not None:
        return None
    watch(tree_cache)
    return PrefixTree(tree_cache)


class PrefixTree:
    """A ``UnifiedRadixCache``, by its unlocked entries."""

    def __init__(self, tree: UnifiedRadixCache) -> None:
        self._tree: Any = tree
        self._core: Any = tree.tree_core
        self._uses: _Uses = self._core.harli_uses
        self.generation = self._core.root_node_handle()  # a flush makes a new one

    def cached(self) -> int:
        """Tokens, those of locked entries included."""
        return self._tree.evictable_size() + self._tree.protected_size()

    def expendable(self, tokens: int, piece: int, most: int, unused_since_s: float | None) -> list[Entry]:
        """Entries in SGLang's order of eviction, as long as ``tokens`` hold them or they are
        unused.

        Each comes after all that hangs below it. Those that hang lowest come in the tree's very
        order, and under LRU so do those above them: when one was accessed is known from the calls
        that ended at it or below it, or cut it. Under other policies one comes as if by LRU.
        ``piece`` is for trees whose entries can be cut. ``most``: entries.
        """
        found: list[Entry] = []
        nodes: dict[int, Any] = {}
        below: dict[int, list[float]] = {}  # of an entry's children that are in `found`: their uses
        due: list[tuple[float, float, int]] = []  # those whose children all are: accessed, used, number

        def take(key: int, used_s: float) -> bool:
            nonlocal tokens
            node = nodes[key]
            unused = unused_since_s is not None and used_s < unused_since_s
            if len(found) == most or not (unused or node.full_value_len <= tokens):
                return False
            tokens -= node.full_value_len
            value = self._core.get_component_device_value(key, _FULL)
            found.append(Entry(key, node.parent_id, value))
            above = nodes.get(node.parent_id)  # None: the root
            if above is not None:
                uses_below = below.setdefault(node.parent_id, [])
                uses_below.append(used_s)
                if len(uses_below) == above.num_children and self._is_unlocked(node.parent_id):
                    own_s = max(*uses_below, self._uses.used_s(node.parent_id))
                    heapq.heappush(due, (max(own_s, self._cut_s(above)), own_s, node.parent_id))
            return True

        def take_due(until_s: float) -> bool:
            while due and due[0][0] <= until_s:
                _, used_s, key = heapq.heappop(due)
                if not take(key, used_s):
                    return False
            return True

        latest_s, copied = 0.0, 0
        for leaf in self._lowest(most):
            path = self._core.collect_path_info([leaf])[0]
            nodes.update((node.node_id, node) for node in path)
            copied += len(path)  # also those that an earlier path has held
            used_s = self._uses.used_s(leaf)
            latest_s = max(latest_s, used_s, self._cut_s(nodes[leaf]))
            if not take_due(latest_s) or copied > _MOST_NODES or not take(leaf, used_s):
                return found
        take_due(math.inf)
        return found

    def _cut_s(self, node: Any) -> float:
        """When the entry lost its beginning to the one above, which is then the younger of the two:
        SGLang counts it as an access. 0: never."""
        cut = node.parent_id > node.node_id
        return (self._uses.made_s(node.parent_id) or 0.0) if cut else 0.0

    def _lowest(self, most: int) -> list[int]:
        """Entries with none below them, unlocked, in SGLang's order of eviction."""
        leaves: list[int] = []
        self._core.evict_device_start(_FULL, _EVERYTHING)
        try:
            while len(leaves) < most:
                leaf = self._core.evict_device_next_node(_FULL, {_FULL: 0}).node_id
                if leaf is None:
                    break
                leaves.append(leaf)
        finally:
            self._core.evict_device_end(_FULL)
        return leaves

    def _is_unlocked(self, node: int) -> bool:
        return self._unlocked_tokens(node) > 0

    def _unlocked_tokens(self, node: int) -> int:
        """Of the entries from this one up to the root: what is locked lies above what is not."""
        lock = self._core.inc_lock_ref(node)
        self._core.dec_lock_ref(node, lock.to_dec_params())
        return lock.delta

    def unused_tokens(self, entries: Sequence[Entry], since_s: float | None) -> int:
        """Tokens of those that no request has used since then, nor what hangs below them."""
        if since_s is None:
            return 0
        tokens, used = 0, dict[int, float]()  # latest use below an entry
        for entry in entries:
            used_s = max(self._uses.used_s(entry.key), used.get(entry.key, 0.0))
            used[entry.parent] = max(used_s, used.get(entry.parent, 0.0))
            tokens += len(entry.value) if used_s < since_s else 0
        return tokens

    def alive(self, entries: Sequence[Entry]) -> np.ndarray:
        """bool ``[entries]``: one as it was, with nothing below it but entries that may go.

        It copies the paths that the look has copied, which bounds it as well.
        """
        nodes: dict[int, Any] = {}
        unlocked: set[int] = set()
        inner = {entry.parent for entry in entries}
        for entry in entries:
            if entry.key not in inner:
                self._look_up(entry.key, nodes, unlocked)
        alive = np.zeros(len(entries), dtype=bool)
        below: dict[int, int] = {}  # of each entry: those below it that are alive
        for index, entry in enumerate(entries):
            node = nodes.get(entry.key)
            if (
                node is not None
                and entry.key in unlocked
                and node.full_value_len == len(entry.value)
                and node.num_children == below.get(entry.key, 0)
            ):
                alive[index] = True
                below[entry.parent] = below.get(entry.parent, 0) + 1
        return alive

    def _look_up(self, key: int, nodes: dict[int, Any], unlocked: set[int]) -> None:
        """Note this entry and all above it, and which of them no request has locked."""
        try:
            path = self._core.collect_path_info([key])[0]
        except KeyError:
            return  # it is gone
        left = self._unlocked_tokens(key)
        for node in reversed(path):
            left -= node.full_value_len or 0
            if left < 0:
                break
            unlocked.add(node.node_id)
        nodes.update((node.node_id, node) for node in path)

    def evict(self, entries: Sequence[Entry]) -> None:
        """As ``UnifiedRadixCache.evict`` does it; children come before their parents."""
        tree, began = self._tree, time.perf_counter()
        tracker = dict.fromkeys(tree.tree_components, 0)
        slots = tree.token_to_kv_pool_allocator
        slots.free_group_begin()  # else each entry's slots would be joined to all that wait
        self._uses.evicting = True
        try:
            for entry in entries:
                tree._evict_device_leaf(entry.key, tracker)
                self._uses.inherit(entry.parent, entry.key)
        finally:
            self._uses.evicting = False
            slots.free_group_end()
        tree.update_eviction_metrics(tracker[_FULL], began)

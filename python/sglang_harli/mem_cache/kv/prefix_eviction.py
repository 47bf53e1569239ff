"""Makes whole stripes free by evicting prefix-cache entries, for training's growth only.

An entry may go only if SGLang's own eviction, in its own order, would have taken it too on the way
down to the share that is kept: what is hot stays. For what a run cannot do without, that share
counts prefixes in use alone: one long unused may go too, or an accepted job would wait beside an
idle server for ever. The least valuable go first, and among equals the stripes that cost the fewest
cached tokens, the highest first. A stripe counts only if its other pages are free, so that nothing
in use is near, and entries go with all that hangs below them, children first. Of a long entry only
the end goes: it is cut in two first, as SGLang does when a prompt matches a part of it.

The entries' slots are tensors on the device. Which entry lies in which stripe is counted there into
a table of fixed size and read one step late; before an eviction each entry is looked at again on
the host: still in the tree, unlocked, the same slots.

Leans on SGLang 0.5.16: ``mem_cache.radix_cache`` (``evict``, whose bookkeeping this repeats) and
``session.streaming_session`` (which wraps a cache).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode
from sglang.srt.session.streaming_session import StreamingSession
from torch import Tensor

from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.kv.slot_allocator import StripedFreeList
from sglang_harli.mem_cache.kv.stripe_counts import Ready

# Bounds of one look, which runs on the scheduler's thread: a few milliseconds at most.
MAX_ENTRIES = 512
MAX_CELLS = 2**17  # entries times stripes
# The cheapest stripes of the least valuable quarter come first, then of the half, then of all.
BANDS = (4, 2, 1)
LEAST_BAND = 8
_NEVER = np.iinfo(np.int64).max


def evict_stripes(
    tree_cache: BasePrefixCache,
    allocator: StripedFreeList,
    wanted: int,
    keep_slots: int,
    unused_since_s: float | None = None,
) -> int:
    """Evict unlocked prefixes so that whole stripes become free.

    Args:
        tree_cache: the scheduler's; only SGLang's plain radix tree has something to evict.
        wanted: stripes.
        keep_slots: cached tokens, locked ones included, below which nothing is evicted,
        unused_since_s: but entries unused since then (``time.monotonic``); None: nothing at all.

    Returns:
        Stripes that are free now because of it; on a device 0 while the entries are being counted.
    """
    tree = tree_cache.inner if isinstance(tree_cache, StreamingSession) else tree_cache
    if type(tree) is not RadixCache or tree.disable:  # subclasses keep entries elsewhere too
        return 0
    spare = tree.evictable_size() + tree.protected_size() - keep_slots  # tokens that may be evicted
    if (spare <= 0 and unused_since_s is None) or wanted <= 0:
        return 0
    scan = allocator.prefix_scan
    if scan is None:
        allocator.count_stripes()
        scan = allocator.prefix_scan = _look(tree, allocator, spare, unused_since_s)
    if scan is None or not scan.ready():
        return 0
    allocator.prefix_scan = None
    free = allocator.stripe_free_pages()
    if free is None or tree.root_node is not scan.root:
        return 0
    chosen, stripes = scan.choose(free, wanted, max(spare, scan.unused_tokens(unused_since_s)))
    if chosen:
        _evict(tree, chosen)
        allocator.counts.forget()  # the next look is to see what has become free
    return stripes


def _evict(tree: RadixCache, nodes: Sequence[TreeNode]) -> None:
    """As ``RadixCache.evict`` does it; children come before their parents."""
    began = time.perf_counter()
    slots = _slots_of(nodes)
    tree.token_to_kv_pool_allocator.free(torch.cat(slots))
    for node in nodes:
        tree._delete_leaf(node)
        tree._record_remove_event(node)
    tree.update_eviction_metrics(sum(map(len, slots)), began)


def _unused(node: TreeNode, since_s: float | None) -> bool:
    return since_s is not None and node.last_access_time < since_s


def _look(
    tree: RadixCache, allocator: StripedFreeList, spare: int, unused_since_s: float | None
) -> _Scan | None:
    """Start counting the entries that may go; None where there are none."""
    geometry = allocator.pool.geometry
    stripes = [stripe for stripe in reversed(geometry.lendable) if stripe not in allocator.lent_stripes]
    if not stripes:
        return None
    nodes = _expendable(tree, spare, min(MAX_ENTRIES, MAX_CELLS // len(stripes)), unused_since_s)
    if not nodes:
        return None
    values = _slots_of(nodes)
    table = _table(values, stripes, geometry)
    fence = allocator.counts.fence
    if fence is None:
        host, ready = table, lambda: True
    else:
        host = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda)
        host.copy_(table, non_blocking=True)
        ready = fence()
    return _Scan(tree.root_node, tree.page_size, nodes, values, stripes, geometry.stripe_pages, host, ready)


def _slots_of(nodes: Sequence[TreeNode]) -> list[Tensor]:
    return [node.value for node in nodes if node.value is not None]  # None only in trees with a second tier


def _expendable(tree: RadixCache, tokens: int, piece: int, unused_since_s: float | None) -> list[TreeNode]:
    """Entries in SGLang's order of eviction, as long as ``tokens`` hold them or they are unused.
    Each comes after all that hangs below it. ``piece``: tokens; a longer entry's end is cut off."""
    priority = tree.eviction_strategy.get_priority
    heap: list[Any] = [
        (priority(node), node.id, node)
        for node in tree.evictable_leaves
        if tokens > 0 or _unused(node, unused_since_s)
    ]
    heapq.heapify(heap)
    found: list[TreeNode] = []
    remaining: dict[TreeNode, int] = {}  # children that are not in `found` yet
    while heap and len(found) < MAX_ENTRIES:
        _, _, node = heapq.heappop(heap)
        room = piece if _unused(node, unused_since_s) else min(tokens, piece)
        most = room // tree.page_size * tree.page_size
        if most <= 0:
            break
        if len(node.key) > most:
            _cut(tree, node, len(node.key) - most)
        tokens -= len(node.key)
        found.append(node)
        parent = node.parent
        remaining[parent] = remaining.get(parent, len(parent.children)) - 1
        if remaining[parent] == 0 and parent.lock_ref == 0 and parent is not tree.root_node:
            heapq.heappush(heap, (priority(parent), parent.id, parent))
    return found


def _cut(tree: RadixCache, node: TreeNode, length: int) -> None:
    """Put an entry's first ``length`` tokens into one of the same age above it."""
    head = tree._split_node(node.key, node, length)
    head.last_access_time, head.creation_time = node.last_access_time, node.creation_time


def _table(values: list[Tensor], stripes: list[int], geometry: PoolGeometry) -> Tensor:
    """Pages of each entry in each stripe, int32 ``[entries, stripes]``; never waits."""
    device = values[0].device
    firsts = torch.cat([value[:: geometry.page_size] for value in values])  # one slot of each page
    lengths = _to_device([-(-len(value) // geometry.page_size) for value in values], device)
    entry = torch.repeat_interleave(
        torch.arange(len(values), device=device), lengths, output_size=len(firsts)
    )
    others = len(stripes)  # the last column: stripe 0 and the tail
    columns = [others] * (geometry.stripes + 1)
    for column, stripe in enumerate(stripes):
        columns[stripe] = column
    column_of = _to_device(columns, device)
    cells = entry * (others + 1) + column_of[firsts // geometry.stripe_slots]
    table = torch.zeros(len(values) * (others + 1), dtype=torch.int32, device=device)
    table.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))
    return table.view(len(values), others + 1)[:, :others].contiguous()


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    on_gpu = device.type != "cpu"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Scan:
    """One look at the entries that may go.

    Attributes:
        root: of the tree then; a flush makes a new one.
        nodes: children before parents; values: their slots then, by identity.
        stripes: that were looked at, highest first; whole: pages of a stripe.
        table: on the host once ``ready()``, int32 ``[nodes, stripes]``.
    """

    root: TreeNode
    page_size: int
    nodes: list[TreeNode]
    values: list[Tensor]
    stripes: list[int]
    whole: int
    table: Tensor
    ready: Ready

    def choose(self, free: Sequence[int], wanted: int, tokens: int) -> tuple[list[TreeNode], int]:
        """The entries to evict, children first, and how many stripes that frees. ``free``: free
        pages of each stripe; ``wanted``: stripes; ``tokens``: may be evicted."""
        pages = self.table.numpy()
        alive = self._alive()
        free_here = np.array([free[stripe] for stripe in self.stripes])
        # All pages of the stripe are free or an entry's that may go, and one of them is an entry's.
        possible = (free_here < self.whole) & (free_here + pages.sum(0) == self.whole)
        going = self._with_what_hangs_below(pages > 0)
        possible &= ~going[~alive].any(0)
        sizes = np.array([len(value) for value in self.values])
        costs = sizes @ going  # cached tokens that have yet to go for each stripe
        last = len(self.nodes) - 1 - going[::-1].argmax(axis=0)  # the most valuable entry that goes with it
        evicted = np.zeros(len(self.nodes), dtype=bool)
        for band in BANDS:
            near = last < max(len(self.nodes) // band, LEAST_BAND)
            while np.count_nonzero(possible & (costs == 0)) < wanted:
                left = np.where(possible & near & (costs > 0) & (costs <= tokens), costs, _NEVER)
                best = int(left.argmin())  # of equal ones the highest stripe
                if left[best] == _NEVER:
                    break
                new = going[:, best] & ~evicted
                tokens -= int(costs[best])
                costs -= sizes[new] @ going[new]
                evicted |= new
        freed = np.count_nonzero(possible & (costs == 0))
        return [self.nodes[index] for index in np.flatnonzero(evicted)], int(freed)

    def unused_tokens(self, since_s: float | None) -> int:
        """Tokens of the entries that no request has used since then."""
        return sum(
            len(value) for node, value in zip(self.nodes, self.values, strict=True) if _unused(node, since_s)
        )

    def _alive(self) -> np.ndarray:
        """bool ``[nodes]``: an entry as it was, with nothing below it but entries that may go."""
        alive = np.zeros(len(self.nodes), dtype=bool)
        seen: set[TreeNode] = set()
        for index, (node, value) in enumerate(zip(self.nodes, self.values, strict=True)):
            here = node.parent.children.get(node.key.child_key(self.page_size)) is node
            if (
                here
                and node.lock_ref == 0
                and node.value is value
                and seen.issuperset(node.children.values())
            ):
                alive[index] = True
                seen.add(node)
        return alive

    def _with_what_hangs_below(self, touches: np.ndarray) -> np.ndarray:
        """Entries that go with each stripe, bool ``[nodes, stripes]``: in it, and all below."""
        index_of = {node: index for index, node in enumerate(self.nodes)}
        going = touches.copy()
        for index in reversed(range(len(self.nodes))):  # parents before children
            above = index_of.get(self.nodes[index].parent)
            if above is not None:
                going[index] |= going[above]
        return going

"""Makes whole stripes free by evicting prefix-cache entries, for training's growth only.

An entry may go only if SGLang's own eviction, in its own order, would have taken it too on the way
down to the share that is kept: what is hot stays. For what a run cannot do without, that share
counts prefixes in use alone: one long unused may go too, or an accepted job would wait beside an
idle server for ever. The least valuable go first, and among equals the stripes that cost the fewest
cached tokens, the highest first. A stripe counts only if its other pages are free, so that nothing
in use is near, and entries go with all that hangs below them, children first.

The entries' slots are tensors on the device. Which entry lies in which stripe is counted there into
a table of fixed size and read one step late; before an eviction each entry is looked at again on
the host: still in the tree, unlocked, the same slots.

How SGLang's tree is walked and entries are evicted is in ``sglang_versions.*.prefix_tree``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from torch import Tensor

from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.kv.slot_allocator import StripedFreeList
from sglang_harli.mem_cache.kv.stripe_counts import Ready
from sglang_harli.sglang_versions.current import prefix_tree

# Bounds of one look, which runs on the scheduler's thread: a few milliseconds at most.
MAX_ENTRIES = 512
MAX_CELLS = 2**17  # entries times stripes
PIECE = 512  # tokens: of a longer entry the end goes, where the tree can cut it
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
    *,
    among: Sequence[int] | None = None,
) -> int:
    """Evict unlocked prefixes so that whole stripes become free.

    Args:
        tree_cache: the scheduler's; only SGLang's default one has something to evict.
        wanted: stripes.
        keep_slots: cached tokens, locked ones included, below which nothing is evicted,
        unused_since_s: but entries unused since then (``time.monotonic``); None: nothing at all.
        among: the stripes that may become free; None: any. A look that is under way stays as it is.

    Returns:
        Stripes that are free now because of it; on a device 0 while the entries are being counted.
    """
    tree = prefix_tree.of(tree_cache)
    if tree is None:
        return 0
    spare = tree.cached() - keep_slots  # tokens that may be evicted
    if (spare <= 0 and unused_since_s is None) or wanted <= 0:
        return 0
    scan = allocator.prefix_scan
    if scan is None:
        allocator.count_stripes()
        scan = allocator.prefix_scan = _look(tree, allocator, spare, unused_since_s, among)
    if scan is None or not scan.ready():
        return 0
    allocator.prefix_scan = None
    free = allocator.stripe_free_pages()
    if free is None or tree.generation != scan.generation:
        return 0
    tokens = max(spare, tree.unused_tokens(scan.entries, unused_since_s))
    everything = np.ones(len(scan.entries), dtype=bool)
    chosen, stripes = scan.choose(free, everything, wanted, tokens)
    if not tree.alive(chosen).all():  # rare, and dearer: all are looked at again
        chosen, stripes = scan.choose(free, tree.alive(scan.entries), wanted, tokens)
    if chosen:
        tree.evict(chosen)
        allocator.counts.forget()  # the next look is to see what has become free
    return stripes


def _look(
    tree: prefix_tree.PrefixTree,
    allocator: StripedFreeList,
    spare: int,
    unused_since_s: float | None,
    among: Sequence[int] | None,
) -> _Scan | None:
    """Start counting the entries that may go; None where there are none."""
    geometry = allocator.pool.geometry
    wanted = geometry.lendable if among is None else among
    stripes = sorted(set(wanted) - allocator.lent_stripes, reverse=True)
    if not stripes:
        return None
    most = min(MAX_ENTRIES, MAX_CELLS // len(stripes))
    entries = tree.expendable(spare, PIECE, most, unused_since_s)
    if not entries:
        return None
    table = _table([entry.value for entry in entries], stripes, geometry)
    fence = allocator.counts.fence
    if fence is None:
        host, ready = table, lambda: True
    else:
        host = torch.empty_like(table, device="cpu", pin_memory=table.is_cuda)
        host.copy_(table, non_blocking=True)
        ready = fence()
    return _Scan(tree.generation, entries, stripes, geometry.stripe_pages, host, ready)


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
        generation: of the tree then; a flush makes a new one.
        entries: children before parents.
        stripes: that were looked at, highest first; whole: pages of a stripe.
        table: on the host once ``ready()``, int32 ``[entries, stripes]``.
    """

    generation: object
    entries: list[prefix_tree.Entry]
    stripes: list[int]
    whole: int
    table: Tensor
    ready: Ready

    def choose(
        self, free: Sequence[int], alive: np.ndarray, wanted: int, tokens: int
    ) -> tuple[list[prefix_tree.Entry], int]:
        """The entries to evict, children first, and how many stripes that frees.

        Args:
            free: free pages of each stripe.
            alive: bool ``[entries]``: as it was, with nothing below it but entries that may go.
            wanted: stripes; tokens: may be evicted.
        """
        pages = self.table.numpy()
        free_here = np.array([free[stripe] for stripe in self.stripes])
        # All pages of the stripe are free or an entry's that may go, and one of them is an entry's.
        possible = (free_here < self.whole) & (free_here + pages.sum(0) == self.whole)
        going = self._with_what_hangs_below(pages > 0)
        possible &= ~going[~alive].any(0)
        sizes = np.array([len(entry.value) for entry in self.entries])
        costs = sizes @ going  # cached tokens that have yet to go for each stripe
        last = len(self.entries) - 1 - going[::-1].argmax(axis=0)  # the most valuable entry that goes with it
        evicted = np.zeros(len(self.entries), dtype=bool)
        for band in BANDS:
            near = last < max(len(self.entries) // band, LEAST_BAND)
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
        return [self.entries[index] for index in np.flatnonzero(evicted)], int(freed)

    def _with_what_hangs_below(self, touches: np.ndarray) -> np.ndarray:
        """Entries that go with each stripe, bool ``[entries, stripes]``: in it, and all below."""
        index_of = {entry.key: index for index, entry in enumerate(self.entries)}
        going = touches.copy()
        for index in reversed(range(len(self.entries))):  # parents before children
            above = index_of.get(self.entries[index].parent)
            if above is not None:
                going[index] |= going[above]
        return going

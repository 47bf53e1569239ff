"""The host's knowledge of the free list: exact while only the head is taken, and never waited
for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.kv.stripe_counts import StripeCounts, event_fence

CPU = torch.device("cpu")
STRIPES, PAGES = 6, 4  # page size 2: 8 slots a stripe
GEOMETRY = PoolGeometry(slots=STRIPES * 8 + 2, row_bytes=512, buffers=2, page_size=2, stripe_slots=8)
ALL_PAGES = range(1, GEOMETRY.slots // 2)


def sorted_list(pages) -> torch.Tensor:
    return torch.tensor(sorted(pages), dtype=torch.int64)


def free_in(stripe: int, pages: torch.Tensor) -> int:
    return sum(page // PAGES == stripe for page in pages.tolist())


@given(st.sets(st.sampled_from(ALL_PAGES)), st.integers(0, 30), st.data())
@settings(deadline=None)
def test_counts_follow_the_list(pages, taken, data):
    counts = StripeCounts(GEOMETRY, CPU)
    free = sorted_list(pages)
    counts.start(free)
    free = free[min(taken, len(free)) :]
    for stripe, count in enumerate(counts.free_pages(len(free))):
        assert count == free_in(stripe, free)
    whole = counts.wholly_free(len(free))
    assert whole == [s for s in reversed(GEOMETRY.lendable) if free_in(s, free) == PAGES]

    chosen = data.draw(st.sets(st.sampled_from(whole))) if whole else set()
    left = torch.cat([free[part] for part in counts.cut(chosen, len(free))])
    assert left.tolist() == [page for page in free.tolist() if page // PAGES not in chosen]
    assert counts.wholly_free(len(left)) == [s for s in whole if s not in chosen]


def test_a_stripe_whose_pages_are_being_taken_is_not_offered():
    counts = StripeCounts(GEOMETRY, CPU)
    free = sorted_list(ALL_PAGES)
    counts.start(free)
    assert counts.wholly_free(len(free)) == [5, 4, 3, 2, 1]
    free = free[3 + 1 :]  # stripe 0 has three free pages; this takes the first of stripe 1
    assert counts.wholly_free(len(free)) == [5, 4, 3, 2]
    assert counts.free_pages(len(free))[:3] == [0, 3, 4]
    with pytest.raises(ValueError, match=r"stripes \[1\] are not known to be free"):
        counts.cut([1, 2], len(free))


def test_what_is_on_its_way_is_not_known():
    arrived = []
    counts = StripeCounts(GEOMETRY, CPU, fence=lambda: lambda: bool(arrived))
    free = sorted_list(ALL_PAGES)
    counts.start(free)
    assert counts.pending and not counts.known()
    free = free[4:]  # allocated before the counts arrive
    arrived.append(True)
    assert counts.known() and not counts.pending
    assert counts.wholly_free(len(free)) == [5, 4, 3, 2]


def test_forgotten_counts_do_not_come_back():
    arrived = []
    counts = StripeCounts(GEOMETRY, CPU, fence=lambda: lambda: bool(arrived))
    counts.start(sorted_list(ALL_PAGES))
    counts.forget()
    arrived.append(True)
    assert not counts.known() and not counts.pending
    with pytest.raises(ValueError, match="not known"):
        counts.cut([3], len(ALL_PAGES))


def test_a_host_needs_no_fence():
    assert event_fence(CPU) is None

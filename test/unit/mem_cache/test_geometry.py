"""How a pool is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.mem_cache.geometry import (
    LARGEST_CHUNK,
    LARGEST_DEVICE_CHUNK,
    LEAST_STRIPES,
    MANY_STRIPES,
    PoolGeometry,
    fullest_window,
    runs_of,
)

MIB = 2**20


@given(
    slots=st.integers(1, 200_000),
    row_bytes=st.sampled_from([96, 128, 256, 384, 1024, 2048, 3072]),
    buffers=st.sampled_from([2, 8, 64]),
    page_size=st.sampled_from([1, 16, 64]),
    granularity=st.sampled_from([4096, 2 * MIB]),
)
def test_a_plan_is_aligned_and_wastes_nothing(slots, row_bytes, buffers, page_size, granularity):
    cut = PoolGeometry.plan(
        slots=slots, row_bytes=row_bytes, buffers=buffers, page_size=page_size, granularity=granularity
    )
    assert cut.chunk_bytes % granularity == 0
    assert cut.stripe_slots % page_size == 0
    assert cut.stripes * cut.stripe_slots <= slots < (cut.stripes + 1) * cut.stripe_slots
    assert cut.total_bytes == slots * row_bytes * buffers
    assert 0 not in cut.lendable  # slot 0 takes padded tokens
    assert cut.lendable_bytes == len(cut.lendable) * cut.stripe_bytes <= cut.total_bytes
    if cut.lendable:
        assert cut.slots_of(cut.lendable[-1]).stop <= slots
    smallest = PoolGeometry.plan(
        slots=1, row_bytes=row_bytes, buffers=buffers, page_size=page_size, granularity=granularity
    )
    if cut.stripe_slots > smallest.stripe_slots:  # only as coarse as the pool's size allows
        large = granularity == LARGEST_CHUNK and cut.stripes >= MANY_STRIPES
        assert cut.stripes >= LEAST_STRIPES
        assert cut.chunk_bytes <= (LARGEST_DEVICE_CHUNK if large else LARGEST_CHUNK)


def test_a_pool_of_8192_slots_can_lend():
    cut = PoolGeometry.plan(slots=8193, row_bytes=512, buffers=16, page_size=1, granularity=4096)
    assert len(cut.lendable) >= LEAST_STRIPES - 1


def test_llama_8b_on_cuda():
    def plan(slots: int, granularity: int = 2 * MIB) -> PoolGeometry:
        return PoolGeometry.plan(
            slots=slots, row_bytes=2048, buffers=64, page_size=1, granularity=granularity
        )

    small = plan(100_001)
    assert (small.stripe_slots, small.chunk_bytes, small.stripe_bytes) == (1024, 2 * MIB, 128 * MIB)
    assert plan(400_001).chunk_bytes == 4 * MIB and plan(400_001).stripes == 195
    h200 = plan(1_007_000)  # 123 GiB: a quarter of the handles
    assert h200.chunk_bytes == 8 * MIB and h200.stripes == 245
    assert plan(10_000_000).chunk_bytes == 8 * MIB  # no larger
    assert plan(400_001, 4096).chunk_bytes == plan(10_000_000, 4096).chunk_bytes == 2 * MIB  # a host's
    assert plan(128 * 2048 - 1).chunk_bytes == 2 * MIB and plan(128 * 2048).chunk_bytes == 4 * MIB


def test_a_pool_smaller_than_a_stripe_lends_nothing():
    cut = PoolGeometry.plan(slots=10, row_bytes=64, buffers=2, page_size=1, granularity=4096)
    assert cut.stripes == 0 and not cut.lendable and cut.lendable_bytes == 0


@pytest.mark.parametrize(
    ("stripes", "runs"),
    [([], []), ([5, 2, 3], [range(2, 4), range(5, 6)]), ([7, 6, 5], [range(5, 8)])],
)
def test_runs(stripes, runs):
    assert runs_of(stripes) == runs


def test_stripes_for():
    cut = PoolGeometry(slots=100, row_bytes=4, buffers=2, page_size=1, stripe_slots=10)
    assert [cut.stripes_for(n) for n in (0, 1, 80, 81)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("lent", "free", "tried", "window"),
    [
        ((), (9, 8, 3, 5), (), range(7, 10)),  # two free of three
        ((7,), (9, 8, 3, 5), (), range(3, 6)),
        ((7,), (9, 8, 3, 5), (3,), range(4, 7)),  # one
        ((), (7, 8, 9), (), range(6, 9)),  # those that are free all need nothing
        ((3, 6, 9), (), (), None),
    ],
)
def test_the_fullest_window(lent, free, tried, window):
    assert fullest_window(range(1, 10), lent, free, 3, tried) == window

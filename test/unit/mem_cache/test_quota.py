"""When training may grow and when it must give: watermarks, cool-down, cap."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.quota import (
    COOL_DOWN_S,
    HALF_LIFE_S,
    LONGEST_COOL_DOWN_S,
    QUIET_S,
    Quota,
    Watermarks,
)

STRIPES, STRIPE = 64, 100  # stripes, slots of each
GEOMETRY = PoolGeometry(slots=STRIPES * STRIPE, row_bytes=4, buffers=2, page_size=1, stripe_slots=STRIPE)
LENDABLE = STRIPES - 1


def grown(slots: int, *, by_s: float = 0.5) -> Quota:
    """A quota that has just seen the KV cache grow."""
    quota = Quota(GEOMETRY, max_train_bytes=None)
    quota.observe(now_s=10.0, used_slots=0)
    quota.observe(now_s=10.0 + by_s, used_slots=slots)
    return quota


def test_a_quiet_pool_may_be_lent_whole():
    quota = Quota(GEOMETRY, max_train_bytes=None)
    quota.observe(now_s=1.0, used_slots=3000)
    assert quota.watermarks == Watermarks(0, 0)
    assert quota.may_take(now_s=1.0, free_stripes=LENDABLE, train_stripes=0) == LENDABLE
    assert quota.must_give(free_stripes=0, train_stripes=9) == 0


def test_watermarks_follow_the_growth_of_one_second_and_fade():
    quota = grown(600)
    assert quota.watermarks == Watermarks(6, 12)
    quota.observe(now_s=10.5 + HALF_LIFE_S, used_slots=600)
    assert quota.watermarks == Watermarks(3, 6)
    quota.observe(now_s=10.5 + 10 * HALF_LIFE_S, used_slots=600)
    assert quota.watermarks == Watermarks(0, 0)


def test_growth_over_more_than_a_second_counts_by_the_second():
    quota = Quota(GEOMETRY, max_train_bytes=None)
    for tenth in range(100):
        quota.observe(now_s=5.0 + tenth / 10, used_slots=10 * tenth)
    assert quota.watermarks.low == 1  # 100 slots a second, though 1,000 in all


def test_a_quarter_of_the_pool_is_the_most_that_watermarks_hold():
    marks = grown(STRIPES * STRIPE).watermarks
    assert marks.low == LENDABLE // 8 and marks.high <= LENDABLE // 4


def test_taking_leaves_the_high_mark_and_giving_refills_to_it():
    quota = grown(600)
    assert quota.may_take(now_s=10.5, free_stripes=40, train_stripes=5) == 28
    assert quota.may_take(now_s=10.5, free_stripes=11, train_stripes=5) == 0
    assert quota.must_give(free_stripes=6, train_stripes=20) == 0
    assert quota.must_give(free_stripes=5, train_stripes=20) == 7
    assert quota.must_give(free_stripes=0, train_stripes=4) == 4


def room_of(quota: Quota, now_s: float) -> int:
    """What may be taken of 40 free stripes, watermarks apart."""
    return quota.may_take(now_s=now_s, free_stripes=40, train_stripes=0) + quota.watermarks.high


def test_what_the_cache_used_a_moment_ago_is_left_alone_until_it_has_faded():
    quota = grown(3000)
    assert room_of(quota, 10.5) == 40
    quota.observe(now_s=11.0, used_slots=1000)
    assert room_of(quota, 11.0) == 20
    quota.observe(now_s=11.0 + HALF_LIFE_S, used_slots=1000)
    assert room_of(quota, 11.0 + HALF_LIFE_S) == 30
    quota.observe(now_s=11.0 + HALF_LIFE_S, used_slots=1600)
    assert room_of(quota, 11.0 + HALF_LIFE_S) == 36, "what is used again is no dip any more"
    quota.observe(now_s=11.0 + 10 * HALF_LIFE_S, used_slots=1600)
    assert room_of(quota, 11.0 + 10 * HALF_LIFE_S) == 40


def test_what_was_evicted_for_training_may_be_taken():
    quota = grown(3000)
    quota.evicted(2000)
    quota.observe(now_s=10.6, used_slots=1000)
    assert room_of(quota, 10.6) == 40


def test_the_cap_counts_whole_stripes_and_may_change():
    quota = Quota(GEOMETRY, max_train_bytes=10 * GEOMETRY.stripe_bytes + 1)
    assert quota.may_take(now_s=0.0, free_stripes=40, train_stripes=4) == 6
    quota.max_train_bytes = 2 * GEOMETRY.stripe_bytes
    assert quota.may_take(now_s=0.0, free_stripes=40, train_stripes=4) == 0
    quota.max_train_bytes = None
    assert quota.max_stripes == LENDABLE


def test_the_cool_down_doubles_and_is_forgotten():
    quota, now_s, pauses = Quota(GEOMETRY, max_train_bytes=None), 1000.0, []
    for _ in range(7):
        quota.reclaimed(now_s)
        before = now_s
        while not quota.may_take(now_s=now_s, free_stripes=40, train_stripes=0):
            now_s += 0.25
        pauses.append(now_s - before)
    assert pauses == [min(COOL_DOWN_S * 2**n, LONGEST_COOL_DOWN_S) for n in range(7)]
    now_s += QUIET_S
    quota.reclaimed(now_s)
    assert not quota.cooling(now_s + COOL_DOWN_S)


def test_reclaims_within_a_cool_down_are_one_event():
    quota = Quota(GEOMETRY, max_train_bytes=None)
    for step in range(20):
        quota.reclaimed(100.0 + step / 100)
    assert quota.cooling(100.19 + COOL_DOWN_S - 0.01)
    assert not quota.cooling(100.19 + COOL_DOWN_S)


def test_the_kept_share_of_prefixes_in_slots():
    quota = Quota(GEOMETRY, max_train_bytes=None)
    quota.prefix_keep = 0.25
    assert quota.kept_prefix_slots() == STRIPES * STRIPE // 4


@given(
    uses=st.lists(st.tuples(st.floats(0, 3), st.integers(0, STRIPES * STRIPE)), max_size=30),
    free=st.integers(0, LENDABLE),
    train=st.integers(0, LENDABLE),
)
def test_what_was_just_taken_need_not_be_given_and_the_other_way_round(uses, free, train):
    quota, now_s = Quota(GEOMETRY, max_train_bytes=None), 0.0
    for after_s, used in uses:
        now_s += after_s
        quota.observe(now_s=now_s, used_slots=used)
    take = quota.may_take(now_s=now_s, free_stripes=free, train_stripes=train)
    assert 0 <= take <= free
    if take:
        assert quota.must_give(free_stripes=free - take, train_stripes=train + take) == 0
    give = quota.must_give(free_stripes=free, train_stripes=train)
    assert 0 <= give <= train
    if give:
        assert quota.may_take(now_s=now_s, free_stripes=free + give, train_stripes=train - give) == 0


def moves_under(period_s: float, low: int, high: int, *, lease: int, seconds: float = 240.0) -> int:
    """How often a lease goes to training or comes back, while the KV cache's use is a square
    wave."""
    quota, train, moves, step_s = Quota(GEOMETRY, max_train_bytes=None), 0, 0, 0.05
    for step in range(int(seconds / step_s)):
        now_s = step * step_s
        used = low if math.floor(2 * now_s / period_s) % 2 == 0 else high
        quota.observe(now_s=now_s, used_slots=used)
        free = LENDABLE - train - -(-used // STRIPE)
        if train and (free < 0 or quota.must_give(free_stripes=free, train_stripes=train)):
            train, moves = 0, moves + 1
            quota.reclaimed(now_s)
        elif not train and quota.may_take(now_s=now_s, free_stripes=free, train_stripes=0) >= lease:
            train, moves = lease, moves + 1
    return moves


@pytest.mark.parametrize(
    ("period_s", "low", "high", "most"),
    [
        (2.0, 1000, 5000, 2),  # the pool cannot hold both at the peak: once bitten
        (2.0, 1000, 3000, 2),
        (0.2, 0, 6000, 2),
        (10.0, 1000, 5000, 2),
        (2.0, 1000, 1150, 1),  # a ripple moves nothing
    ],
)
def test_an_oscillating_load_does_not_move_memory_to_and_fro(period_s, low, high, most):
    assert moves_under(period_s, low, high, lease=30) <= most


def test_a_slow_tide_moves_it_once_each_way():
    assert 2 <= moves_under(120.0, 1000, 5000, lease=30, seconds=600.0) <= 10

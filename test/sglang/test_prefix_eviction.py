"""Whole stripes out of a real radix tree: what is locked, hot or kept stays, and SGLang's books
agree."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.core import MemoryPurpose
from support.model_runner import NEWEST
from support.plain_arguments import plain_arguments
from support.pool_parts import all_free_pages
from support.prefix_fixture import KINDS, SEEDS, STRIPE, PrefixCacheUnderTest, under_test

MakeRig = Callable[..., PrefixCacheUnderTest]


@pytest.fixture(params=KINDS)
def rig_of(request: pytest.FixtureRequest) -> MakeRig:
    return functools.partial(under_test, kind=request.param)


@pytest.mark.parametrize("page", [1, 4])
def test_the_least_valuable_entries_go_and_what_is_kept_stays(page, rig_of):
    rig = rig_of(page=page)
    entries = [rig.cache(STRIPE) for _ in range(9)]  # all but the last 7 pages
    assert rig.slots.available_size() == 7 * page
    hot = entries[0]
    rig.node(hot)  # asked for a moment ago
    keep = 7 * STRIPE * page
    freed = rig.evict(5, keep)
    rig.check()
    cached = rig.tree.evictable_size() + rig.tree.protected_size()
    assert freed >= 1 and cached >= keep
    assert rig.cached(hot) == len(hot)
    assert rig.evict(5, cached) == 0, "nothing below what is kept"
    assert len(rig.slots.free_stripes()) == freed


def test_entries_that_came_since_the_last_count_can_go(rig_of):
    """Nothing was freed since, so nothing makes the counts anew: they must follow what was
    taken."""
    rig = rig_of()
    assert len(rig.slots.free_stripes()) == 9
    for _ in range(9):
        rig.cache(STRIPE)
    assert rig.slots.waiting_pages() == 0
    assert rig.evict(3) == 3
    assert len(rig.slots.free_stripes()) == 3
    rig.check()


def test_a_stripe_that_costs_least_goes_first(rig_of):
    rig = rig_of(stripes=6)
    rig.use(STRIPE - 1)  # stripe 0
    long = rig.cache(2 * STRIPE)  # stripes 1, 2
    short = rig.cache(STRIPE)  # stripe 3
    rig.use(STRIPE)  # stripe 4; 5 is free
    assert rig.evict(1) == 1
    assert rig.cached(short) == 0 and rig.cached(long) == len(long)
    assert rig.slots.free_stripes() == [5, 3]
    rig.check()


def test_old_entries_go_before_new_ones_of_the_same_cost(rig_of):
    rig = rig_of(stripes=24)
    rig.use(STRIPE - 1)
    entries = [rig.cache(STRIPE) for _ in range(20)]
    for entry in entries[:4]:
        rig.node(entry)  # asked for again
    assert rig.evict(4) == 4
    gone = [number for number, entry in enumerate(entries) if rig.cached(entry) == 0]
    assert len(gone) == 4 and set(gone) <= set(range(4, 12)), (
        "of the oldest eight, the four in the highest stripes"
    )
    assert gone == [8, 9, 10, 11]
    rig.check()


def test_children_go_with_their_parent_and_not_the_other_way(rig_of):
    rig = rig_of(stripes=6)
    rig.use(STRIPE - 1)
    root = rig.cache(STRIPE)  # stripe 1
    child = rig.cache(STRIPE, after=root)  # took stripes 2 and 3, gave 2 back as duplicates
    assert rig.evict(1) == 1
    assert rig.cached(child) == len(root)  # the child alone was evicted
    rig.check()
    child = rig.cache(STRIPE, after=root)
    assert rig.evict(6) == 2  # everything that is cached
    assert rig.tree.evictable_size() == 0
    rig.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority"])
def test_what_is_in_use_keeps_its_whole_stripe(policy, rig_of):
    rig = rig_of(stripes=4, policy=policy)
    rig.use(STRIPE - 1)
    locked = rig.cache(2)
    rig.lock(locked)
    beside = rig.cache(STRIPE - 2)  # fills stripe 1
    rig.use(1)
    other = rig.cache(STRIPE - 1)  # fills stripe 2
    assert rig.evict(3) == 0
    assert rig.cached(beside) and rig.cached(other), "no entry is evicted for nothing"
    rig.unlock(locked)
    assert rig.evict(3) == 1
    assert not rig.cached(beside) and not rig.cached(locked) and rig.cached(other)
    rig.check()


def test_removed_entries_are_told_to_routers(rig_of):
    from sglang.srt.disaggregation.kv_events import BlockRemoved

    rig = rig_of(stripes=4)
    rig.use(STRIPE - 1)
    rig.cache(STRIPE)
    rig.tree.take_events()
    assert rig.evict(1) == 1
    (event,) = rig.tree.take_events()
    assert isinstance(event, BlockRemoved) and len(event.block_hashes) == STRIPE


class Late:
    """Counts that arrive when the test says so, as a device's do."""

    def __init__(self) -> None:
        self.generation = 0

    def fence(self) -> Any:
        asked = self.generation
        return lambda: self.generation > asked


def late_rig(rig_of: MakeRig) -> tuple[PrefixCacheUnderTest, Late, list[list[int]]]:
    late = Late()
    rig = rig_of(stripes=6, fence=late.fence)
    rig.use(STRIPE - 1)
    entries = [rig.cache(STRIPE) for _ in range(3)]
    assert rig.evict(1) == 0, "asked for, not here yet"
    assert rig.evict(1) == 0
    late.generation += 1
    return rig, late, entries


def test_on_a_device_it_happens_one_call_later(rig_of):
    rig, late, entries = late_rig(rig_of)
    assert rig.evict(1) == 1
    assert [rig.cached(entry) for entry in entries].count(0) == 1
    assert rig.slots.free_stripes() == []
    late.generation += 1
    assert len(rig.slots.free_stripes()) == 3
    rig.check()


@pytest.mark.parametrize("late", [None, Late()], ids=["host", "device"])
def test_training_grows_into_the_prefix_cache_down_to_what_is_kept(late, rig_of):
    now_s = itertools.count(step=1000.0)
    rig = rig_of(stripes=20, fence=late.fence if late else None, clock=lambda: next(now_s))
    rig.use(STRIPE - 1)
    entries = [rig.cache(STRIPE) for _ in range(15)]  # 4 stripes are free
    keep = 6 * STRIPE
    rig.pool.lend_to(rig.pool.relieve, lambda stripes, _unused_since_s: rig.evict(stripes, keep))
    asked = 0
    while (lease := rig.pool.lease(MemoryPurpose.MICRO_BATCH, "large", 12)) is None and asked < 10:
        asked += 1
        if late:
            late.generation += 1
    assert lease is not None and asked == (0 if late is None else 2), (
        "one call for the entries, one for the slots"
    )
    assert sum(rig.cached(entry) > 0 for entry in entries) == 7
    rig.check()
    assert rig.pool.lease(MemoryPurpose.KEPT, "more", 2) is None, "kept activations are not worth a prefix"
    lease.give_back()
    rig.check()


def test_an_entry_that_changed_meanwhile_is_left_alone(rig_of):
    rig, _, (first, second, third) = late_rig(rig_of)
    rig.lock(first)  # in use now
    rig.node(second[:3])  # split
    rig.cache(2, after=third)  # has a child now
    assert rig.evict(3) == 0
    assert all(rig.cached(entry) == len(entry) for entry in (first, second, third))
    rig.check()


def test_a_flush_meanwhile_ends_the_look(rig_of):
    rig, _, _ = late_rig(rig_of)
    rig.tree.reset()
    rig.slots.clear()
    rig.held = 0
    assert rig.evict(3) == 0
    rig.check()


@pytest.mark.skipif(NEWEST, reason="other classes")
def test_caches_without_a_plain_tree_have_nothing_to_evict(rig_of):
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.chunk_cache import ChunkCache
    from sglang.srt.session.streaming_session import StreamingSession

    from sglang_harli.mem_cache.kv.prefix_eviction import evict_stripes

    rig = rig_of(stripes=4)
    rig.use(STRIPE - 1)
    rig.cache(STRIPE)
    params = CacheInitParams(
        disable=True,
        req_to_token_pool=None,  # type: ignore[arg-type]
        token_to_kv_pool_allocator=rig.slots,
        page_size=1,
    )
    assert evict_stripes(ChunkCache(params), rig.slots, 1, 0) == 0

    class OtherTree(type(rig.tree)):
        pass

    rig.tree.__class__ = OtherTree
    assert evict_stripes(rig.tree, rig.slots, 1, 0) == 0
    rig.tree.__class__ = OtherTree.__bases__[0]
    assert evict_stripes(StreamingSession(rig.tree), rig.slots, 1, 0) == 1


@pytest.mark.skipif(not NEWEST, reason="other classes")
def test_caches_without_a_tree_of_one_kind_have_nothing_to_evict(rig_of):
    rig = rig_of(stripes=4)
    rig.use(STRIPE - 1)
    rig.cache(STRIPE)

    class OtherTree(type(rig.tree)):
        pass

    rig.tree.__class__ = OtherTree
    assert rig.evict(1) == 0
    rig.tree.__class__ = OtherTree.__bases__[0]
    for name, value in (("disable", True), ("cache_controller", object()), ("linker", object())):
        before = getattr(rig.tree, name)
        setattr(rig.tree, name, value)
        assert rig.evict(1) == 0, name
        setattr(rig.tree, name, before)
    assert rig.evict(1) == 1


@pytest.mark.skipif(not NEWEST, reason="entries can be cut")
def test_a_long_entry_goes_whole_once_nobody_uses_it(rig_of):
    rig = rig_of()
    tokens = rig.cache(9 * STRIPE)
    keep = 3 * STRIPE
    assert rig.evict(8, keep=keep) == 0 and rig.cached(tokens) == len(tokens)
    rig.age(tokens, by_s=120.0)
    assert rig.evict(8, keep=keep, unused_since_s=time.monotonic() - 60.0) >= 8
    assert rig.cached(tokens) == 0
    rig.check()


def test_a_cold_conversation_goes_before_a_hot_prompt(rig_of):
    """Its earlier turns hang above the last one; they are as old, and come before what was used
    since."""
    rig = rig_of(stripes=12)
    rig.use(STRIPE - 1)
    turns: list[int] = []
    for _ in range(3):
        turns = rig.cache(STRIPE, after=turns)
    hot = rig.cache(STRIPE)
    rig.node(hot)
    assert rig.evict(9, keep=len(hot)) >= 1
    assert rig.cached(hot) == len(hot) and rig.cached(turns) == 0
    rig.check()


def test_a_prefix_used_by_itself_is_as_hot_as_that(rig_of):
    rig = rig_of(stripes=12)
    rig.use(STRIPE - 1)
    shared = rig.cache(STRIPE)
    tail = rig.cache(STRIPE, after=shared)
    other = rig.cache(STRIPE)
    rig.node(shared)  # asked for without the tail
    assert rig.evict(9, keep=STRIPE) >= 1
    assert rig.cached(shared) == len(shared) and rig.cached(other) == 0
    assert rig.cached(tail) == len(shared)
    rig.check()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_prefix_was_used_with_what_sglang_has_evicted_below_it(policy, rig_of):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    rig = rig_of(stripes=12, policy=policy)
    shared = rig.cache(STRIPE)
    tails = [rig.cache(STRIPE, after=shared) for _ in range(2)]
    rig.node(shared)
    time.sleep(0.05)
    since_s = time.monotonic()
    for tail in tails:
        rig.node(tail)
    rig.tree.evict(EvictParams(num_tokens=2 * STRIPE))
    assert rig.cached(tails[0]) == rig.cached(tails[1]) == rig.cached(shared) == len(shared)
    assert rig.evict(9, keep=rig.size, unused_since_s=since_s) == 0
    assert rig.cached(shared) == len(shared)
    assert rig.evict(9, keep=rig.size, unused_since_s=time.monotonic()) >= 1
    assert rig.cached(shared) == 0
    rig.check()


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=60)
def test_entries_come_in_the_order_in_which_sglang_would_evict_them(data, kind):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    from sglang_harli.sglang_versions.current import prefix_tree

    rig = under_test(kind=kind, stripes=40)
    prefixes: list[list[int]] = [[]]
    for _ in range(data.draw(st.integers(1, 20))):
        before = data.draw(st.sampled_from(prefixes))
        kind = data.draw(st.sampled_from(["cache", "cache", "match", "evict"]))
        if kind == "cache":
            cut = data.draw(st.integers(0, len(before)))
            prefixes.append(rig.cache(data.draw(st.integers(1, 6)), after=before[:cut]))
        elif kind == "match":
            rig.node(before)
        else:
            rig.tree.evict(EvictParams(num_tokens=1))
    tree = prefix_tree.of(rig.tree)
    assert tree is not None
    entries = tree.expendable(10**6, 10**6, 512, None)
    expected: list[list[int]] = []
    while rig.tree.evictable_size():
        freed = len(all_free_pages(rig.slots))
        rig.tree.evict(EvictParams(num_tokens=1))
        expected.append(sorted(all_free_pages(rig.slots)[freed:]))
    assert [sorted(entry.value.tolist()) for entry in entries] == expected


@pytest.mark.skipif(not NEWEST, reason="its tree keeps the uses itself")
def test_uses_of_entries_that_are_gone_are_forgotten(rig_of, monkeypatch):
    from sglang_harli.sglang_versions.newest import prefix_tree

    monkeypatch.setattr(prefix_tree, "_MOST_USES", 8)
    rig = rig_of()
    for _ in range(40):
        whole = rig.cache(8)
        rig.cache(4, after=whole[:4])  # cuts it in two: nothing ends with the entry above both
        tree = prefix_tree.of(rig.tree)
        assert tree is not None
        tree.evict(tree.expendable(10**6, 10**6, 512, None))
        assert tree.cached() == 0 and len(tree._uses._last) <= 8
    rig.check()


def test_uses_are_known_from_the_start_of_training_not_from_the_first_look(rig_of):
    from sglang_harli.config import HarliOptions
    from sglang_harli.managers.scheduler.trainer_setup import training_memory

    rig = rig_of(watched=False)
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=rig.slots, tree_cache=rig.tree, server_args=plain_arguments()
    )
    assert training_memory(scheduler, torch.device("cpu"), HarliOptions()).pool is rig.pool
    old = [rig.cache(STRIPE) for _ in range(4)]
    time.sleep(0.05)
    since_s = time.monotonic()
    new = [rig.cache(STRIPE) for _ in range(4)]
    rig.node(old[0])
    assert rig.evict(9, keep=rig.size, unused_since_s=since_s) >= 1
    assert all(rig.cached(entry) for entry in (old[0], *new))
    assert not all(rig.cached(entry) for entry in old[1:])
    rig.check()


@pytest.mark.skipif(not NEWEST, reason="its tree has no paths to copy")
def test_one_look_copies_a_bounded_number_of_nodes(rig_of, monkeypatch):
    """Paths that share their beginnings cost as much as others."""
    from sglang_harli.sglang_versions.newest import prefix_tree

    monkeypatch.setattr(prefix_tree, "_MOST_NODES", 14)
    rig = rig_of()
    shared: list[int] = []
    for _ in range(4):
        shared = rig.cache(1, after=shared)
    for _ in range(6):
        rig.cache(1, after=shared)
    tree = prefix_tree.of(rig.tree)
    assert tree is not None
    assert len(tree.expendable(10**6, 10**6, 512, None)) == 2
    rig.check()


def test_one_look_is_bounded(rig_of, monkeypatch):
    from sglang_harli.mem_cache.kv import prefix_eviction

    rig = rig_of(stripes=400)
    for _ in range(1500):
        rig.cache(2)
    looks: list[Any] = []
    table = prefix_eviction._table
    monkeypatch.setattr(
        prefix_eviction, "_table", lambda values, *more: looks.append(values) or table(values, *more)
    )
    assert rig.evict(1) == 1
    ((values),) = looks
    assert len(values) == min(prefix_eviction.MAX_ENTRIES, prefix_eviction.MAX_CELLS // 399)
    rig.check()


@given(
    data=st.data(),
    page=st.sampled_from([1, 4]),
    keep=st.integers(0, 60),
    wanted=st.integers(1, 8),
    kind=st.sampled_from(KINDS),
)
@settings(deadline=None, max_examples=80)
def test_any_tree(data, page, keep, wanted, kind):
    rig = under_test(kind=kind, stripes=data.draw(st.integers(3, 12)), page=page)
    prefixes: list[list[int]] = [[]]
    in_use: list[torch.Tensor] = []
    locked: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["cache", "cache", "cache", "use", "end", "lock", "lend"]))
        if kind == "cache":
            before = data.draw(st.sampled_from(prefixes))
            cut = data.draw(st.integers(0, len(before) // page)) * page
            prefixes.append(rig.cache(data.draw(st.integers(1, 6)), after=before[:cut]))
        elif kind == "use" and (slots := rig.use(data.draw(st.integers(1, 4)))) is not None:
            in_use.append(slots)
        elif kind == "end" and in_use:
            slots = in_use.pop(data.draw(st.integers(0, len(in_use) - 1)))
            rig.held -= len(slots)
            rig.slots.free(slots)
        elif kind == "lock":
            chosen = data.draw(st.sampled_from(prefixes))
            rig.lock(chosen)
            locked.append(chosen[: rig.cached(chosen)])
        elif kind == "lend":
            rig.pool.lease(MemoryPurpose.STATE, f"lease-{next(SEEDS)}", data.draw(st.integers(1, 3)))
    rig.check()
    tree = rig.tree
    cached = tree.evictable_size() + tree.protected_size()
    before = set(rig.slots.free_stripes())
    available = rig.slots.available_size()
    freed = rig.evict(wanted, keep * page)
    left = tree.evictable_size() + tree.protected_size()
    assert left == cached or left >= keep * page
    assert rig.slots.available_size() + left == available + cached, "evicted slots are free, nothing else"
    assert len(set(rig.slots.free_stripes()) - before) == freed
    assert (left == cached) == (freed == 0), "no entry is evicted for nothing"
    for prefix in locked:
        assert rig.cached(prefix) == len(prefix), "what is locked stays"
    rig.check()


@pytest.mark.skipif(NEWEST, reason="its tree cannot be asked to cut an entry")
@pytest.mark.parametrize("page", [1, 4])
def test_of_one_long_entry_the_end_goes_and_its_beginning_still_matches(page, rig_of):
    rig = rig_of(stripes=10, page=page)
    tokens = rig.cache(9 * STRIPE)
    keep = 3 * STRIPE * page
    freed = rig.evict(8, keep=keep)
    assert freed >= 5 and rig.slots.free_stripes()
    left = rig.cached(tokens)
    assert keep <= left < len(tokens)
    rig.node(tokens)  # matches what is left, and finds the tree in order
    rig.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru"])
def test_the_share_is_kept_for_prefixes_in_use_only_where_memory_cannot_be_done_without(policy, rig_of):
    rig = rig_of(policy=policy)
    entries = [rig.cache(STRIPE) for _ in range(9)]
    for entry in entries[:5]:
        rig.age(entry, by_s=120.0)
    rig.lock(entries[0])
    rig.age(entries[0], by_s=120.0)
    keep, minute_ago = rig.size, time.monotonic() - 60.0
    assert rig.evict(9, keep) == 0, "the share is kept"
    assert rig.evict(9, keep, unused_since_s=minute_ago - 120.0) == 0, "none is unused for so long"
    freed = rig.evict(9, keep, unused_since_s=minute_ago)
    rig.check()
    assert freed >= 2
    assert all(rig.cached(entry) == len(entry) for entry in (entries[0], *entries[5:])), "locked, and in use"
    assert not any(rig.cached(entry) for entry in entries[1:5])
    assert rig.evict(9, keep, unused_since_s=minute_ago) == 0


def test_unused_entries_beyond_the_share_are_not_taken_with_the_used_ones_above_it(rig_of):
    rig = rig_of()
    entries = [rig.cache(STRIPE) for _ in range(9)]
    rig.age(entries[0], by_s=120.0)
    keep = rig.tree.evictable_size() - 3 * STRIPE  # three may go as it is
    assert rig.evict(9, keep, unused_since_s=time.monotonic() - 60.0) >= 1
    assert rig.tree.evictable_size() >= keep
    rig.check()


@pytest.mark.skipif(NEWEST, reason="its tree cannot be asked to cut an entry")
def test_a_cut_entry_is_as_old_as_it_was(rig_of):
    rig = rig_of(stripes=10)
    old, new = rig.cache(5 * STRIPE), rig.cache(3 * STRIPE)
    rig.evict(1, keep=7 * STRIPE)
    rig.evict(8, keep=3 * STRIPE)
    assert rig.cached(new) == len(new) and rig.cached(old) == 0
    rig.check()

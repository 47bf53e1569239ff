"""Both slot allocators over a real pool: SGLang's capacity to the slot, whatever training borrows
meanwhile."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.model_runner import NEWEST
from support.pool_parts import all_free_pages

PAGE = 4
ROW_BYTES = 512
DTYPE = torch.float32
NAMES = itertools.count(1)
# How SGLang gives a request's slots back.
WAYS = ("free", "free_segment", "free_page_ids") if NEWEST else ("free",)


class Ticks:
    """A clock by which every look is long after the one before: no cool-down lasts."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1000.0
        return self.now


class Late:
    """What a device's counts are like: they arrive when the test says so."""

    def __init__(self) -> None:
        self.generation = 0

    def fence(self):
        asked = self.generation
        return lambda: self.generation > asked

    def arrive(self) -> None:
        self.generation += 1


def make(page_size: int, size: int, stripe_slots: int = 8, fence: Any = None) -> tuple[UnifiedPool, Any]:
    """A pool whose training gives back what it is asked for, and its allocator."""
    from sglang_harli.mem_cache.kv.slot_allocator import HarliPagedAllocator, HarliTokenAllocator

    geometry = PoolGeometry(size + page_size, ROW_BYTES, 2, page_size, stripe_slots)
    make_pool = functools.partial(UnifiedPool, geometry, HostBacking(geometry, debug=True), clock=Ticks())
    slots: Any
    if page_size == 1:
        slots = HarliTokenAllocator(size, DTYPE, "cpu", None, make_pool, fence)
    else:
        slots = HarliPagedAllocator(size, page_size, DTYPE, "cpu", None, make_pool, fence)
    pool: UnifiedPool = slots.pool

    def give_back(stripes: int) -> None:
        for lease in list(pool.leases.values()):
            if stripes > 0:
                stripes -= len(lease.stripes)
                lease.give_back()

    pool.lend_to(give_back, None)
    return pool, slots


def lend(pool: UnifiedPool, stripes: int) -> Any:
    return pool.lease(MemoryPurpose.STATE, f"lease-{next(NAMES)}", stripes)


class Machine(RuleBasedStateMachine):
    """Allocations, frees, leases, flushes and roll-backs in any order.

    ``held`` are the requests: their slots in the order of their tokens.  Each slot in use has a
    stamp in its row.
    """

    page = 1

    @initialize(late=st.booleans(), pages=st.integers(40, 90))
    def build(self, late: bool, pages: int) -> None:
        self.late = Late() if late else None
        self.size = pages * self.page
        self.pool, self.slots = make(
            self.page, self.size, 8 * self.page, self.late.fence if self.late else None
        )
        self.rows = self.pool.backing.kv_bytes(1).view(torch.int64).view(self.size + self.page, -1)
        self.stamps: dict[int, int] = {}
        self.held: list[list[int]] = []

    # ---- requests
    def pages_held(self) -> set[int]:
        return {slot // self.page for slot in self.stamps}

    def room(self) -> int:
        """What plain SGLang would have free, in pages."""
        return self.size // self.page - len(self.pages_held())

    def use(self, slots: list[int]) -> None:
        assert not set(slots) & set(self.stamps), "a slot was handed out twice"
        assert min(slots) >= self.page, "the padded page was handed out"
        for slot in slots:
            self.stamps[slot] = stamp = next(NAMES)
            self.rows[slot] = stamp

    @rule(pages=st.integers(1, 50))
    def alloc(self, pages: int) -> None:
        fits = pages <= self.room()
        slots = self.slots.alloc(pages * self.page)
        assert (slots is not None) == fits, "the same capacity as SGLang's"
        if slots is not None:
            assert slots.dtype == torch.int64 and len(slots) == pages * self.page
            self.use(slots.tolist())
            self.held.append(slots.tolist())

    def give(self, slots: list[int], way: str) -> None:
        for slot in slots:
            assert set(self.rows[slot].tolist()) == {self.stamps.pop(slot)}, "a row in use was overwritten"
        if way == "free_segment":
            self.slots.free_segment(torch.tensor(slots), start_pos=0)
        elif way == "free_page_ids":
            self.slots.free_page_ids(torch.tensor(slots[:: self.page]) // self.page)
        else:
            self.slots.free(torch.tensor(slots))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), way=st.sampled_from(WAYS))
    def free(self, data: st.DataObject, way: str) -> None:
        self.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))), way)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=3),
        stripes=st.integers(0, 6),
    )
    def free_group(self, data: st.DataObject, ways: list[str], stripes: int) -> None:
        before = self.slots.available_size()
        self.slots.free_group_begin()
        for way in ways[: len(self.held)]:
            self.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))), way)
        assert self.slots.available_size() == before, "a group is free at its end"
        if stripes:
            lend(self.pool, stripes)
        self.slots.free_group_end()

    # ---- training
    @rule(stripes=st.integers(1, 6))
    def lend(self, stripes: int) -> None:
        lease = lend(self.pool, stripes)
        if lease is not None:
            lease.carve((lease.nbytes,), torch.uint8).fill_(0xAB)

    @precondition(lambda self: self.pool.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.leases[data.draw(st.sampled_from(sorted(self.pool.leases)))].give_back()

    @precondition(lambda self: self.late is not None)
    @rule()
    def counts_arrive(self) -> None:
        assert self.late is not None
        self.late.arrive()

    # ---- the scheduler
    @precondition(lambda self: not self.held)
    @rule()
    def flush(self) -> None:
        self.slots.clear()

    @precondition(lambda self: not NEWEST)
    @rule(pages=st.integers(1, 50), stripes=st.integers(0, 3), back=st.booleans())
    def roll_back(self, pages: int, stripes: int, back: bool) -> None:
        state = self.slots.backup_state()
        self.slots.alloc(pages * self.page)
        if back and self.pool.leases:
            next(iter(self.pool.leases.values())).give_back()
        elif stripes:
            lend(self.pool, stripes)
        self.slots.restore_state(state)

    # ---- what always holds
    @invariant()
    def capacity_is_sglangs(self) -> None:
        assert self.slots.available_size() == self.room() * self.page
        assert self.pool.free_slots == len(all_free_pages(self.slots)) * self.page

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        free = all_free_pages(self.slots)
        stripe_pages = self.pool.geometry.stripe_pages
        lent = {s * stripe_pages + i for s in self.pool.ledger.lent() for i in range(stripe_pages)}
        assert self.slots.free_pages.tolist() == sorted(self.slots.free_pages.tolist())
        assert len(free) + len(self.pages_held()) + len(lent) == self.size // self.page
        assert set(free) | self.pages_held() | lent == set(range(1, self.size // self.page + 1))
        assert self.slots.lent_stripes == set(self.pool.ledger.lent())
        self.pool.check()


class PagedMachine(Machine):
    """The same in pages, with requests that grow token by token and in pieces."""

    page = PAGE

    @rule(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
    def extend_new(self, lengths: list[int]) -> None:
        fresh: list[list[int]] = [[] for _ in lengths]
        if self.grow(fresh, lengths, decode=False):
            self.held += fresh

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(1, 9), decode=st.booleans())
    def extend_old(self, data: st.DataObject, more: int, decode: bool) -> None:
        chosen = data.draw(st.sets(st.integers(0, len(self.held) - 1), min_size=1))
        growing = [self.held[index] for index in sorted(chosen)]
        self.grow(growing, [len(s) + (1 if decode else more) for s in growing], decode=decode)

    def grow(self, growing: list[list[int]], lengths: list[int], *, decode: bool) -> bool:
        before, after = torch.tensor([len(s) for s in growing]), torch.tensor(lengths)
        last = torch.tensor([s[-1] if s else -1 for s in growing])
        pages = int(((after + PAGE - 1) // PAGE - (before + PAGE - 1) // PAGE).sum())
        fits = pages <= self.room()
        if decode:
            slots = self.slots.alloc_decode(after, after, last.to(torch.int32))
        else:
            slots = self.slots.alloc_extend(before, before, after, after, last, int((after - before).sum()))
        assert (slots is not None) == fits, "the same capacity as SGLang's"
        if slots is None:
            return False
        assert slots.dtype == torch.int64
        self.use(slots.tolist())
        for request, part in zip(growing, torch.split(slots, (after - before).tolist()), strict=True):
            request += part.tolist()
            for position, slot in enumerate(request):
                assert slot == request[position // PAGE * PAGE] + position % PAGE, "a page is filled in order"
        return True


TestMachine = Machine.TestCase
TestPagedMachine = PagedMachine.TestCase
TestMachine.settings = TestPagedMachine.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=30
)


# ------------------------------------------------------------------ SGLang's choice of slots
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6),
    data=st.data(),
)
@settings(deadline=None)
def test_pages_are_filled_as_sglang_fills_them(requests, data):
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    _, slots = make(PAGE, 400, 32)
    order = data.draw(st.permutations(range(1, 101)))
    slots.free_pages = torch.tensor(order)
    before = torch.tensor([prefix for prefix, _ in requests])
    after = before + torch.tensor([more for _, more in requests])
    last = torch.tensor([400 * i + prefix - 1 for i, (prefix, _) in enumerate(requests)])
    total = int((after - before).sum())
    expected = torch.empty(total, dtype=torch.int64)
    alloc_extend_naive(before, after, last, slots.free_pages, expected, PAGE, "cpu")
    new_pages = int(((after + PAGE - 1) // PAGE - (before + PAGE - 1) // PAGE).sum())
    assert slots.alloc_extend(before, before, after, after, last, total).tolist() == expected.tolist()
    assert slots.free_pages.tolist() == order[new_pages:]

    slots.free_pages = torch.tensor(order)
    expected = torch.empty(len(requests), dtype=torch.int64)
    alloc_extend_naive(after, after + 1, last, slots.free_pages, expected, PAGE, "cpu")
    decoded = slots.alloc_decode(after + 1, after + 1, last.to(torch.int32))
    assert decoded.tolist() == expected.tolist()


@pytest.mark.parametrize("page", [1, PAGE])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_frees_of_every_kind_are_counted_in(way, grouped, page):
    pool, slots = make(page, 100 * page, 8 * page)
    held = slots.alloc(100 * page)
    assert slots.free_stripes() == []
    if grouped:
        slots.free_group_begin()
    part = held[7 * page : 39 * page]  # stripes 1 to 4
    if way == "free_segment":
        slots.free_segment(part, start_pos=7 * page)
    elif way == "free_page_ids":
        slots.free_page_ids(part[::page] // page)
    else:
        slots.free(part)
    if grouped:
        assert slots.free_stripes() == []
        slots.free_group_end()
    assert slots.available_size() == 32 * page
    assert slots.free_stripes() == [4, 3, 2, 1]
    assert lend(pool, 3).stripes == (4, 3, 2)


def test_an_upper_bound_on_the_pages_of_a_prompt_takes_nothing_back():
    """SGLang's ``alloc_extend`` sorts freed pages in by a bound on the new pages; only what is
    really short may cost training its memory, and the counts must follow."""
    pool, slots = make(PAGE, 40 * PAGE, 8 * PAGE)
    lease = lend(pool, 3)  # 24 of 40 pages
    held = slots.alloc(15 * PAGE)  # one page is left
    ends, starts = torch.tensor([3, 3, 3]), torch.tensor([1, 1, 1])
    last = torch.tensor([4, 8, 12])
    taken = slots.alloc_extend(starts, starts, ends, ends, last, 6)
    assert taken.tolist() == [5, 6, 9, 10, 13, 14], "each goes on in its own page"
    assert not lease.revoked and pool.reclaims == 0
    slots.free(held)
    assert slots.available_size() == 40 * PAGE
    assert lend(pool, 1).stripes == (1,), "those that were freed are counted in"
    one, none = torch.tensor([17 * PAGE]), torch.tensor([0])
    assert slots.alloc_extend(none, none, one, one, none - 1, 17 * PAGE) is not None
    assert pool.reclaims == 1


@pytest.mark.parametrize("page", [1, PAGE])
def test_without_a_lease_and_a_shortage_nothing_is_counted_or_sorted(page, monkeypatch):
    _, slots = make(page, 64 * page)
    monkeypatch.setattr(slots, "merge_and_sort_free", lambda: pytest.fail("sorted"))
    monkeypatch.setattr(slots.counts, "start", lambda free: pytest.fail("counted"))
    held = [slots.alloc(4 * page) for _ in range(8)]
    for indices in held:
        slots.free(indices)
    assert slots.alloc(32 * page) is not None


# ------------------------------------------------------------------ with training
def test_an_allocation_takes_back_what_is_lent():
    pool, slots = make(1, 100)
    lease = lend(pool, 6)
    other = lend(pool, 3)
    assert slots.available_size() == 100 and pool.free_slots == 100 - 9 * 8
    assert slots.alloc(100 - 9 * 8) is not None and not lease.revoked
    more = slots.alloc(10)
    assert more is not None and lease.revoked and not other.revoked
    assert pool.reclaims == 1
    assert slots.alloc(1000) is None and not other.revoked, "what is not there at all costs training nothing"


def test_low_slots_go_first_and_high_stripes_are_lent():
    pool, slots = make(1, 100)
    assert slots.alloc(10).tolist() == list(range(1, 11))
    assert lend(pool, 2).stripes == (11, 10)  # stripe 12 is not full: slots 96 to 100


def test_a_flush_takes_no_lease_away():
    pool, slots = make(PAGE, 40 * PAGE, 8 * PAGE)
    lease = lend(pool, 2)
    slots.alloc(8 * PAGE)
    slots.clear()
    assert slots.available_size() == 40 * PAGE
    assert pool.free_slots == (40 - 16) * PAGE
    lease.give_back()
    assert slots.alloc(40 * PAGE) is not None


def test_a_stripe_is_given_back_once():
    pool, slots = make(1, 100)
    lend(pool, 2)
    with pytest.raises(ValueError, match="not lent"):
        slots.restore([1])


def test_on_a_device_the_answer_comes_one_call_later():
    late = Late()
    pool, slots = make(1, 100, fence=late.fence)
    assert lend(pool, 2) is None
    late.arrive()
    lease = lend(pool, 2)
    assert lease is not None
    held = slots.alloc(70)
    assert lend(pool, 5) is None  # nothing newer was freed, and 14 slots are all that is left
    slots.free(held)
    assert slots.free_stripes() == []  # what is known was offered: the freed ones are being counted
    late.arrive()
    assert slots.free_stripes() == list(range(9, 0, -1))

"""Slots of a decode server: taken by SGLang's own preallocation from a pool full of training."""

from __future__ import annotations

import array
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_harli.core import MemoryPurpose
from sglang_harli.managers.scheduler.memory import transfers
from sglang_harli.mem_cache.backing.host import POISON, HostBacking
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.model_runner import publish, server_args

SLOTS, STRIPE, ROW_BYTES = 256, 16, 512


class Noted:
    """A backing, and the order in which it was used."""

    def __init__(self, backing: Any) -> None:
        self._backing, self.log = backing, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backing, name)

    def take_back(self, *given: Any) -> None:
        self.log.append("take_back")
        self._backing.take_back(*given)

    def settle(self) -> None:
        self.log.append("settle")
        self._backing.settle()


@pytest.fixture(params=[HostBacking, StaticBacking])
def backing(request: pytest.FixtureRequest) -> Noted:
    geometry = PoolGeometry(SLOTS + 1, ROW_BYTES, 2, 1, STRIPE)
    if request.param is HostBacking:
        return Noted(HostBacking(geometry, debug=True))
    return Noted(StaticBacking(geometry, "cpu", debug=True))


@pytest.fixture
def slots(backing: Noted) -> Any:
    """All of the pool that can be lent is lent, poisoned."""
    from sglang_harli.mem_cache.kv.slot_allocator import HarliTokenAllocator

    make_pool = functools.partial(UnifiedPool, backing.geometry, backing)
    slots = HarliTokenAllocator(SLOTS, torch.float32, "cpu", None, make_pool)
    pool: UnifiedPool = slots.pool

    def give_back(stripes: int) -> None:
        for lease in list(pool.leases.values()):
            if stripes > 0:
                stripes -= len(lease.stripes)
                lease.give_back()

    pool.lend_to(give_back, None)
    for number in range(len(pool.geometry.lendable)):
        assert pool.lease(MemoryPurpose.STATE, f"lease {number}", 1) is not None
    assert pool.free_slots <= STRIPE
    return slots


@pytest.fixture
def queue(slots: Any, tiny_model: Callable[..., str]) -> Any:
    """SGLang's queue, as a decode server without a prefix cache has it."""
    from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeReqToTokenPool

    publish(server_args(tiny_model(), disaggregation_mode="decode", disable_radix_cache=True))
    queue = DecodePreallocQueue.__new__(DecodePreallocQueue)
    queue.token_to_kv_pool_allocator = slots
    queue.token_to_kv_pool = slots.get_kvcache()
    queue.req_to_token_pool = DecodeReqToTokenPool(8, SLOTS, "cpu", False, 8)
    queue.num_reserved_decode_tokens = 8
    queue.tree_cache = SimpleNamespace(  # type: ignore[assignment]  # asked for its size in an error's text
        evictable_size=lambda: 0, protected_size=lambda: 0, maybe_hand_to_session=lambda req: None
    )
    queue.scheduler = SimpleNamespace(  # type: ignore[assignment]
        enable_hisparse=False,
        server_args=SimpleNamespace(disaggregation_decode_enable_radix_cache=False),
        tp_worker=SimpleNamespace(is_hybrid_swa=False),
    )
    return queue


def request(tokens: int) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    return Req(
        rid=f"r{tokens}",
        origin_input_text="",
        origin_input_ids=array.array("q", range(tokens)),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=4),
    )


def pre_alloc(queue: Any, req: Any) -> torch.Tensor:
    return transfers.pre_alloc(type(queue)._pre_alloc, queue, req)


@pytest.mark.parametrize("tokens", [20, 100, SLOTS])
def test_a_full_pool_gives_back_before_the_prefill_server_hears_of_the_slots(queue, slots, backing, tokens):
    taken = pre_alloc(queue, request(tokens))
    assert len(set(taken.tolist())) == tokens
    assert slots.pool.reclaims == 1
    assert backing.log[-1] == "settle" and "take_back" in backing.log
    rows = backing.kv_bytes(0).view(SLOTS + 1, ROW_BYTES)
    assert not rows[taken].any(), "poison or training's bytes lie where a prompt's KV is to come"
    slots.pool.check()


def test_the_slots_that_are_still_lent_are_none_of_them(queue, slots, backing):
    taken = set(pre_alloc(queue, request(40)).tolist())
    geometry = slots.pool.geometry
    for stripe in slots.lent_stripes:
        assert taken.isdisjoint(geometry.slots_of(stripe))
    if backing.name == "static":  # training's bytes lie in the KV rows: untouched
        rows = backing.kv_bytes(0).view(SLOTS + 1, ROW_BYTES)
        lent = [slot for stripe in slots.lent_stripes for slot in geometry.slots_of(stripe)]
        assert lent and bool((rows[lent] == POISON).all())


# ------------------------------------------------------------------ a transfer that is given up
def pop(slots: Any, before: int, arrived: int, left: int) -> None:
    queue = SimpleNamespace(
        queue=[object()] * before, scheduler=SimpleNamespace(token_to_kv_pool_allocator=slots)
    )

    def original(it: Any) -> list[object]:
        it.queue = it.queue[:left]
        return [object()] * arrived

    assert len(transfers.pop_transferred(original, queue)) == arrived


@pytest.mark.parametrize(("before", "arrived", "left"), [(0, 0, 0), (3, 2, 1), (2, 0, 2)])
def test_transfers_that_end_well_hold_nothing_off(slots, before, arrived, left):
    pop(slots, before, arrived, left)
    assert not slots.pool.quota.cooling(0.0)


def test_slots_of_one_that_was_given_up_are_not_training_s_own_bytes_for_a_while(slots, backing):
    now_s = slots.pool._clock()
    pop(slots, 3, 1, 1)
    in_place = backing.name == "static"
    assert slots.pool.quota.cooling(now_s + transfers.STRAY_WRITES_S - 1) is in_place
    assert not slots.pool.quota.cooling(slots.pool._clock() + transfers.STRAY_WRITES_S + 1)

"""SGLang's lists of slots are edited on one stream, whatever stream the pool is asked on."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.cuda.happens_before import HappensBefore, OrderedDevice, UnorderedError
from support.plain_arguments import plain_arguments

SIZE, STRIPE_SLOTS = 128, 16


class Rig:
    """The real allocators and pool between a scheduler's stream and one of forwards and quanta."""

    def __init__(self, page_size: int, *, edits_on_schedule: bool) -> None:
        from sglang_harli.mem_cache.kv.slot_allocator import HarliPagedAllocator, HarliTokenAllocator

        self.device = device = OrderedDevice()
        self.forward, self.schedule = device.Stream(), device.Stream()
        geometry = PoolGeometry(SIZE + page_size, 64, 2, page_size, STRIPE_SLOTS)
        with device.stream(self.schedule):
            backing = StaticBacking(geometry, "cpu", stream=self.forward, module=device)
            make_pool = functools.partial(UnifiedPool, geometry, backing)
            shared = (torch.float32, "cpu", None, make_pool, self.fence)
            self.slots: Any = (
                HarliTokenAllocator(SIZE, *shared)
                if page_size == 1
                else HarliPagedAllocator(SIZE, page_size, *shared)
            )
        self.pool: UnifiedPool = self.slots.pool
        edit_under = functools.partial(device.stream, self.schedule) if edits_on_schedule else nullcontext
        self.leases: list[Any] = []
        self.pool.lend_to(self.relieve, None, edit_under)

    def relieve(self, stripes: int) -> None:
        for lease in list(self.leases):
            lease.give_back()

    def fence(self) -> Any:
        event = self.device.Event()
        event.record()

        def ready() -> bool:
            event.synchronize()
            return True

        return ready

    def lease(self, name: str) -> Any:
        for _ in range(3):  # the counts come one call later
            if (lease := self.pool.lease(MemoryPurpose.STATE, name, 2)) is not None:
                self.leases.append(lease)
                return lease
        raise AssertionError("no lease")


def serve(rig: Rig, *, in_span: bool) -> None:
    """Allocations and frees on the scheduler's stream; leases come and go in a quantum's span."""
    device, slots = rig.device, rig.slots
    span = functools.partial(device.stream, rig.forward) if in_span else nullcontext
    with device.stream(rig.schedule), HappensBefore(device):
        held = slots.alloc(32)
        for number in range(3):
            slots.free(held[:16])
            with span():
                lease = rig.lease(f"lease-{number}")
            with device.stream(rig.forward):
                for extent in lease.extents:
                    extent.fill_(1)
            held = torch.cat([held[16:], slots.alloc(16)])
            with span():
                lease.give_back()
                rig.leases.remove(lease)
            slots.free(slots.alloc(16))
        with span():
            rig.lease("last")
        assert slots.alloc(SIZE - 32) is not None, "an allocation takes the lease back"


@pytest.mark.parametrize("page_size", [1, 16])
def test_moves_within_a_span_edit_the_lists_on_the_schedulers_stream(page_size: int):
    serve(Rig(page_size, edits_on_schedule=True), in_span=True)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_checker_finds_edits_on_the_stream_of_the_span(page_size: int):
    with pytest.raises(UnorderedError):
        serve(Rig(page_size, edits_on_schedule=False), in_span=True)


class Scheduler:
    """What training's memory reads of SGLang's scheduler; 0.5.16 has no stream of its own before
    its loop begins."""

    def __init__(self, slots: Any) -> None:
        self.token_to_kv_pool_allocator, self.tree_cache = slots, None
        self.server_args = plain_arguments()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that slots were edited on."""
    from sglang_harli.sglang_versions.current import prefix_tree

    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: (found.append(stream), nullcontext())[1])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(prefix_tree, "watch", lambda cache: None)
    return found


def test_training_memory_names_the_schedulers_stream(used: list[Any]):
    """It is made, or made anew, when SGLang's loop starts: after training was set up."""
    from sglang_harli.config import HarliOptions
    from sglang_harli.managers.scheduler import trainer_setup

    rig = Rig(1, edits_on_schedule=False)
    scheduler: Any = Scheduler(rig.slots)
    trainer_setup.training_memory(scheduler, torch.device("cuda"), HarliOptions())
    scheduler.schedule_stream = rig.schedule
    rig.pool.lease(MemoryPurpose.STATE, "one", 1)
    assert used == [rig.schedule]


def test_before_the_loop_slots_are_edited_where_they_were_made(used: list[Any]):
    """By the run that warms up, whose stream is that of forwards."""
    from sglang_harli.config import HarliOptions
    from sglang_harli.managers.scheduler import trainer_setup

    rig = Rig(1, edits_on_schedule=False)
    trainer_setup.training_memory(Scheduler(rig.slots), torch.device("cuda"), HarliOptions())
    assert rig.lease("one")
    assert set(used) == {"default"}

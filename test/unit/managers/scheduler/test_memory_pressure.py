"""Training's memory in the scheduler: what goes under pressure, who waits and why, the cap; on a
real pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_harli.core import MemoryPurpose, QuantumKind, StepLoad, SubState
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import UNBOUNDED
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.peft_trainer.memory import adapter_state
from sglang_harli.protocol import internal
from sglang_harli.protocol.shared_memory import SharedBuffer
from support.pool_parts import Clock, Slots, small_geometry, small_pool
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until

STRIPE = 64  # slots
KEPT, MICRO, STATE = (purpose.value for purpose in (*MemoryPurpose,))
assert (KEPT, MICRO, STATE) == ("kept", "micro_batch", "state")


class Rig:
    """A trainer on a real pool on the host, the peer that feeds it, and a slot allocator that takes
    memory back."""

    def __init__(self, run_dir: str, *, stripes: int = 24, quantum_rows: int | None = 1) -> None:
        self.pool: UnifiedPool
        self.slots: Slots
        self.clock: Clock
        self.pool, self.slots, self.clock = small_pool(small_geometry(stripes))
        self.run_dir = run_dir
        self.peer, self.host = Peer(run_dir), Host(run_dir, quantum_rows=quantum_rows, pool=self.pool)
        self.pressure = self.host.pressure
        until(self.host, self.peer, lambda: self.peer.of(internal.Hello))

    def until(self, reached: Callable[[], object]) -> None:
        """Turns until ``reached``; for the pool each is a second."""
        until(self.host, self.peer, lambda: self.later(1.0) or reached(), limit_s=60.0)

    def start(self, steps: int = 4, attempt: int = 1, **hp: object) -> None:
        self.peer.send(internal.StartRun(spec=spec(attempt, steps, **hp)))
        for step in range(1, steps + 1):
            self.peer.send(*batch(step, attempt))

    def held(self) -> dict[str, int]:
        """Stripes by purpose."""
        unit = self.pool.geometry.stripe_bytes
        return {name: held // unit for name, held in self.pool.bytes_by_purpose().items() if held}

    def take(self, stripes: int) -> list[int]:
        """An allocation that leaves requests ``stripes`` fewer than training holds of them now."""
        taken = self.slots.alloc(len(self.slots.free) + stripes * STRIPE)
        assert taken is not None
        return taken

    def later(self, seconds: float) -> None:
        self.clock.now_s += seconds

    def finish(self) -> dict[str, bytes]:
        """The final state, once the last step is done."""
        give_slot(self.peer, self.run_dir, self.peer.of(internal.RunStarted)[-1].attempt)
        self.until(lambda: self.peer.of(internal.SnapshotReady))
        ready = self.peer.of(internal.SnapshotReady)[-1]
        slot = SharedBuffer.open(ready.slot)
        state = {ref.name: bytes(slot.view(ref)) for ref in ready.slot.tensors}
        slot.close()
        self.peer.send(internal.SnapshotSaved(job=ready.job, attempt=ready.attempt, step=ready.step))
        self.until(lambda: self.host.trainer.run is None)
        return state

    def close(self) -> None:
        assert not self.pool.leases and not self.pool.train_stripes
        self.pool.check()
        self.host.link.close()
        self.peer.socket.close()
        self.pool.backing.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


# ------------------------------------------------------------------ the ladder
def test_the_cheapest_goes_first_and_no_more_than_is_needed(run_dir):
    rig = Rig(run_dir, quantum_rows=None)
    rig.start()
    rig.until(lambda: len(rig.held()) == 3)
    held = rig.held()
    taken = rig.take(1)
    assert 0 < held[KEPT] - rig.held().get(KEPT, 0) <= held[KEPT]
    assert rig.held()[MICRO] == held[MICRO] and rig.held()[STATE] == held[STATE]
    if KEPT in rig.held():
        taken += rig.take(rig.held()[KEPT])
    reclaims = rig.pool.reclaims
    assert rig.held() == {MICRO: held[MICRO], STATE: held[STATE]}
    taken += rig.take(1)
    assert rig.held() == {STATE: held[STATE]}
    assert (rig.pressure.dropped_micro_batches, rig.pressure.spills) == (1, 0)
    taken += rig.take(1)
    assert rig.held() == {} and rig.pressure.spills == 1
    assert rig.host.trainer.run is not None and rig.host.trainer.run.training.spilled
    assert rig.pool.reclaims == reclaims + 2
    rig.slots.release(taken)
    rig.until(lambda: len(rig.peer.of(internal.StepDone)) == 4)
    assert not rig.peer.of(internal.RunFailed) and rig.pressure.dropped_runs == 0
    rig.finish()
    rig.close()


def final_state(run_dir: str, *, shaken: int | None) -> dict[str, bytes]:
    """The state after four steps; where ``shaken``, requests come and go at random between the
    quanta."""
    rig = Rig(run_dir)
    rig.start(gradient_accumulation_steps=1)
    rng = np.random.default_rng(shaken)
    turns = 0

    def trained() -> bool:
        nonlocal turns
        turns += 1
        if shaken is not None and turns % 3 == 0:
            free = rig.slots.available_size()
            taken = rig.slots.alloc(int(rng.integers(1, free + 1))) or []
            rig.slots.release(taken)
            rig.later(float(rng.choice([0.0, 2.0, 120.0])))
        return len(rig.peer.of(internal.StepDone)) == 4

    rig.until(trained)
    assert (rig.pressure.dropped_micro_batches > 0) is (shaken is not None)
    assert (rig.pressure.spills > 0) is (shaken is not None)
    state = rig.finish()
    rig.close()
    return state


def test_whatever_is_taken_back_the_weights_are_the_same_to_the_bit(tmp_path):
    states = []
    for shaken in (None, 1, 2):
        for run_dir in temporary_run_dir(tmp_path / str(shaken)):
            states.append(final_state(run_dir, shaken=shaken))
    assert states[0] and states[0] == states[1] == states[2]


def test_without_host_memory_the_run_goes_back_to_its_checkpoint(run_dir, monkeypatch):
    rig = Rig(run_dir)
    rig.start()
    rig.until(lambda: STATE in rig.held() and rig.peer.of(internal.StepDone))

    def full(*_args: object) -> torch.Tensor:
        raise MemoryError("no host memory")

    monkeypatch.setattr(adapter_state, "_host_like", full)
    taken = rig.take(rig.pool.train_stripes)
    assert rig.host.trainer.run is None and rig.pressure.dropped_runs == 1
    rig.until(lambda: rig.peer.of(internal.RunStopped))
    stopped = rig.peer.of(internal.RunStopped)[-1]
    assert stopped.reason.startswith("memory_pressure: ") and stopped.attempt == 1
    assert not rig.peer.of(internal.RunFailed)
    rig.slots.release(taken)
    rig.start(attempt=2)  # the service's answer
    rig.until(lambda: len([m for m in rig.peer.of(internal.StepDone) if m.attempt == 2]) == 4)
    rig.finish()
    rig.close()


def test_prompts_that_wait_take_only_what_can_be_computed_again_at_once(run_dir):
    rig = Rig(run_dir, quantum_rows=None)
    rig.start()
    rig.until(lambda: len(rig.held()) == 3)
    rig.pressure.make_room(rig.pool.free_slots)
    assert len(rig.held()) == 3  # there is room
    rig.pressure.make_room(rig.slots.available_size())
    assert set(rig.held()) == {MICRO, STATE}
    rig.peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    rig.until(lambda: rig.host.trainer.run is None)
    rig.close()


def test_little_free_memory_is_made_more_before_it_is_needed(run_dir):
    rig = Rig(run_dir)
    rig.start()
    rig.until(lambda: MICRO in rig.held() and STATE in rig.held())
    micro = rig.held()[MICRO]
    taken = rig.slots.alloc(len(rig.slots.free) - STRIPE)  # it grew by almost all within a second
    rig.host.trainer.tick()
    assert MICRO not in rig.held() and STATE in rig.held()
    assert rig.pressure.dropped_micro_batches == 1 and rig.pressure.spills == 0
    assert len(rig.slots.free) >= STRIPE * micro
    rig.slots.release(taken or [])
    rig.until(lambda: len(rig.peer.of(internal.StepDone)) == 4)
    rig.finish()
    rig.close()


# ------------------------------------------------------------------ waiting
def test_a_run_without_memory_waits_with_a_reason_and_begins_when_there_is_some(run_dir):
    rig = Rig(run_dir)
    taken = rig.slots.alloc(rig.slots.available_size())
    rig.start()
    told = lambda: [p for p in rig.peer.of(internal.Progress) if p.sub_state == SubState.WAITING_MEMORY]  # noqa: E731
    rig.until(told)
    reason = told()[-1].reason
    assert "for the adapter and its optimizer is not available now: of" in reason and "training 0 B" in reason
    assert "prefixes may keep" not in reason
    assert rig.host.trainer.run is not None and not rig.peer.of(internal.RunStarted)
    assert rig.pool.train_stripes == 0
    rig.slots.release(taken or [])
    rig.until(lambda: len(rig.peer.of(internal.StepDone)) == 4)
    rig.finish()
    rig.close()


def test_a_run_says_when_no_cached_prefix_can_make_way_for_it(run_dir):
    rig = Rig(run_dir)
    rig.pool.lend_to(rig.pool.relieve, lambda stripes, unused_since_s, among=None: 0)
    rig.slots.alloc(rig.slots.available_size())
    rig.start()
    told = lambda: [p for p in rig.peer.of(internal.Progress) if "no cached prefix can make way" in p.reason]  # noqa: E731
    rig.until(told)
    assert told()[-1].sub_state == SubState.WAITING_MEMORY
    rig.close()


def test_a_run_that_waits_for_memory_can_be_cancelled(run_dir):
    rig = Rig(run_dir)
    rig.start()
    rig.until(lambda: rig.peer.of(internal.StepDone))
    run = rig.host.trainer.run
    assert run is not None
    while run.training.state_consistent:  # into the middle of a step that is being applied
        rig.host.turn()
    taken = rig.take(rig.pool.train_stripes)
    assert run.training.spilled and not run.training.state_consistent
    rig.until(lambda: run.lacks_memory)
    rig.peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    rig.until(lambda: rig.peer.of(internal.RunStopped))
    assert rig.host.trainer.run is None and taken
    rig.close()


def test_a_run_that_can_never_have_its_memory_fails_at_its_start(run_dir):
    rig = Rig(run_dir)
    needs = rig.host.limits.train_memory_bytes + 1
    wanted = spec()
    rig.peer.send(
        internal.StartRun(
            spec=internal.RunSpec(
                job=wanted.job,
                attempt=1,
                hyperparameters=wanted.hyperparameters,
                total_steps=4,
                memory_bytes=needs,
            )
        )
    )
    rig.until(lambda: rig.peer.of(internal.RunFailed))
    failed = rig.peer.of(internal.RunFailed)[-1]
    assert failed.code == "memory_budget" and "harli set max-train-mem" in failed.message
    rig.start(attempt=2)  # the base is as it was
    rig.until(lambda: len(rig.peer.of(internal.StepDone)) == 4)
    rig.finish()
    rig.close()


# ------------------------------------------------------------------ the cap
def test_the_cap_is_set_while_a_job_trains(run_dir):
    rig = Rig(run_dir, quantum_rows=None)
    unit, lendable = rig.pool.geometry.stripe_bytes, rig.pool.geometry.lendable_bytes
    wanted = spec(steps=40)
    needs = rig.host.limits.job_memory_bytes(wanted.hyperparameters, 9, 4)
    run_spec = internal.RunSpec(
        job="job-1",
        attempt=1,
        hyperparameters=wanted.hyperparameters,
        total_steps=40,
        memory_bytes=needs,
    )
    rig.peer.send(internal.StartRun(spec=run_spec))
    for step in range(1, 41):
        rig.peer.send(*batch(step))
    rig.until(lambda: len(rig.held()) == 3)

    def ask(value: str | None, revision: int | None = None) -> internal.OptionsSet:
        known = len(rig.peer.of(internal.OptionsSet))
        message = internal.SetOptions(request=known, values={"max_train_mem": value}, if_revision=revision)
        rig.peer.send(message)
        rig.until(lambda: len(rig.peer.of(internal.OptionsSet)) > known)
        return rig.peer.of(internal.OptionsSet)[-1]

    assert lendable < 2**20  # an option has at least that
    above = ask("1MiB")
    assert above.outcome == "conflict" and f"{lendable} bytes" in above.text and above.revision == 0
    pressure = rig.pressure
    below = pressure.limit_conflict(needs - 1)
    assert below is not None and f"{needs} bytes" in below
    assert "whole stripes" in (pressure.limit_conflict(unit - 1) or "")
    assert pressure.limit_conflict(needs) is None and pressure.limit_conflict(lendable) is None
    rig.until(lambda: len(rig.held()) == 3)
    assert "gives back what is above" in (pressure.limit(needs) or "")
    rig.until(lambda: rig.pool.train_stripes * unit <= needs)
    assert pressure.limit(needs) is None
    assert ask(None, revision=7).outcome == "stale"
    hellos = len(rig.peer.of(internal.Hello))
    assert ask(None).outcome == "applied"
    rig.until(lambda: len(rig.peer.of(internal.Hello)) > hellos)
    limits = rig.host.trainer.limits
    assert limits.train_memory_bytes == pressure.ever_bytes == lendable
    rig.peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    rig.until(lambda: rig.host.trainer.run is None)
    rig.close()


# ------------------------------------------------------------------ kept activations and the policy
def test_a_kept_range_that_is_too_long_for_now_is_recomputed_in_pieces(run_dir):
    rig = Rig(run_dir, quantum_rows=None)
    rig.start()
    trainer = rig.host.trainer
    offer = None
    while offer is None or offer.kind is not QuantumKind.BACKWARD_KEPT:
        rig.host.turn()
        rig.peer.pump()
        offer = trainer.offer()
    assert offer.fixed and len(offer.candidates) == 1
    assert trainer.cut(offer.kind)
    again = trainer.offer()
    assert again is not None and again.kind is QuantumKind.BACKWARD and not again.fixed
    assert again.candidates[0][0] == 1
    trainer.run_quantum(again, qos_policy.decide(StepLoad(), UNBOUNDED, again, rig.host.side.targets))
    rig.until(lambda: len(rig.peer.of(internal.StepDone)) == 4)
    rig.finish()
    rig.close()


# ------------------------------------------------------------------ figures
def test_status_sums_whatever_happens(run_dir):
    rig = Rig(run_dir, quantum_rows=None)
    rig.start()
    taken: list[int] = []
    rng = np.random.default_rng(0)

    def look() -> bool:
        pool = rig.pressure.status()
        assert pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"] == pool["total_bytes"]
        assert sum(pool["by_owner"].values()) == pool["total_bytes"]
        if taken:
            rig.slots.release(taken)
            taken.clear()
        else:
            taken.extend(rig.slots.alloc(int(rng.integers(1, 300))) or [])
        return len(rig.peer.of(internal.StepDone)) == 4

    rig.until(look)
    rig.peer.send(internal.StatusRequest(request=3))
    rig.until(lambda: rig.peer.of(internal.StatusReport))
    report = rig.peer.of(internal.StatusReport)[-1]
    assert report.pool["backing"] == "host" and report.pool["dropped_runs"] == 0
    assert report.training["spilled"] is False
    rig.slots.release(taken)
    rig.finish()
    rig.close()


def test_what_can_never_be_placed_fails_its_run_at_once(run_dir):
    rig = Rig(run_dir)
    rig.pool.quota.max_train_bytes = rig.pool.geometry.stripe_bytes  # the state alone is larger
    rig.start()
    rig.until(lambda: rig.peer.of(internal.RunFailed))
    failed = rig.peer.of(internal.RunFailed)[-1]
    assert failed.code == "memory_budget" and "can never be had" in failed.message
    assert rig.host.trainer.run is None
    rig.pool.quota.max_train_bytes = None
    rig.start(attempt=2)
    rig.until(lambda: len([m for m in rig.peer.of(internal.StepDone) if m.attempt == 2]) == 4)
    rig.finish()
    rig.close()

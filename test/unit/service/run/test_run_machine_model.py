"""The protocol between service and scheduler under every loss, doubling, delay and death (see the
rig)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_harli.core import JobStatus
from sglang_harli.errors import StateError
from sglang_harli.service.jobs import transitions
from sglang_harli.service.run import state
from support.run_model import run_simulation as model
from support.run_model.run_simulation import LossyNetwork
from support.run_model.scheduler_model import LOSSES, STOPPED_AT

PLACES = st.integers(0, 5)
ROUNDS = 600


class Protocol(RuleBasedStateMachine):
    """Users, processes, wires and disks in any order; ``teardown``: once the faults end, every job
    does."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(state, "MOST_AHEAD", 3)  # within a step, and from one to the next
        self.rig = LossyNetwork()
        self.acknowledged: set[str] = set()
        self.bases: dict[str, Any] = {}  # of each job, once it has one

    # ---- users
    @precondition(lambda self: len(self.acknowledged) < 3)
    @rule()
    def submit(self) -> None:
        record = model.new_job(len(self.acknowledged) + 1, self.rig.service.machine.state.base)
        self.rig.service.apply(transitions.created(record, "fine"))
        while self.rig.service.uncommitted:  # the answer waits for it
            self.rig.service.commit()
        self.acknowledged.add(record.id)

    @rule(which=PLACES, what=st.sampled_from(["pause", "resume", "cancel"]))
    def ask(self, which: int, what: str) -> None:
        service = self.rig.service
        if not service.records:
            return
        record = list(service.records.values())[which % len(service.records)]
        try:
            if what == "cancel":
                change = transitions.ask_cancel(record, self.rig.s, in_flight=False)
            else:
                change = transitions.ask_pause(record) if what == "pause" else transitions.ask_resume(record)
        except StateError:
            return
        service.apply(change)
        service.settle()

    @rule(which=PLACES)
    def pause_and_resume(self, which: int) -> None:
        """Also a way to have a job that waits for a pause to end tried at once."""
        for what in ("pause", "resume"):
            self.ask(which, what)

    # ---- the wire
    @rule(to_service=st.booleans(), late=st.booleans(), count=st.integers(1, 8))
    def deliver(self, to_service: bool, late: bool, count: int) -> None:
        for _ in range(count):
            self.rig.deliver(to_service=to_service, late=late)

    def _wire(self, to_service: bool) -> Any:
        return self.rig.to_service if to_service else self.rig.to_scheduler

    @rule(to_service=st.booleans(), place=PLACES)
    def lose(self, to_service: bool, place: int) -> None:
        wire = self._wire(to_service)
        if wire:
            del wire[place % len(wire)]

    @rule(to_service=st.booleans(), place=PLACES, at_once=st.booleans())
    def double(self, to_service: bool, place: int, at_once: bool) -> None:
        wire = self._wire(to_service)
        if wire:
            again = wire[place % len(wire)]
            wire.insert(place % len(wire) if at_once else len(wire), again)

    # ---- deaths and damage
    @rule()
    def kill_service(self) -> None:
        self.rig.kill_service()

    @rule()
    def kill_scheduler(self) -> None:
        self.rig.kill_scheduler()

    @rule(base=st.sampled_from(model.BASES))
    def start_on_another_base(self, base: Any) -> None:
        self.rig.kill_scheduler(base)

    @rule(base=st.sampled_from(model.BASES))
    def update_weights(self, base: Any) -> None:
        self.rig.scheduler.update_weights(base)

    @rule()
    def kill_both(self) -> None:
        self.rig.kill_service()
        self.rig.kill_scheduler()

    @rule()
    def give_up(self) -> None:
        self.rig.scheduler.give_up()

    @rule()
    def trouble_in_the_scheduler(self) -> None:
        self.rig.scheduler.fail(passing=True)

    @rule(reason=st.sampled_from(["the served model is being checked", ""]))
    def hold_runs(self, reason: str) -> None:
        self.rig.scheduler.hold_runs(reason)

    @rule(which=PLACES)
    def damage(self, which: int) -> None:
        """The newest checkpoint of a job that is not over becomes unreadable."""
        found = [job for job, steps in self.rig.disk.items() if steps]
        if not found:
            return
        job = found[which % len(found)]
        if not self.rig.store[job].publishing and not self.rig.store[job].status.final:
            self.rig.disk[job][max(self.rig.disk[job])] = False

    # ---- progress
    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5, 6.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        self.rig.tick(seconds)

    @rule(count=st.integers(1, 6))
    def train(self, count: int) -> None:
        for _ in range(count):
            self.rig.scheduler.work()

    @rule(count=st.integers(1, 4))
    def commit(self, count: int) -> None:
        for _ in range(count):
            self.rig.service.commit()

    @rule(index=PLACES, passing=st.booleans())
    def trouble(self, index: int, passing: bool) -> None:
        self.rig.service.finish(index, ok=False, passing=passing)

    @rule(index=PLACES, ok=st.sampled_from([True, True, True, False]), passing=st.booleans())
    def finish_work(self, index: int, ok: bool, passing: bool) -> None:
        self.rig.service.finish(index, ok=ok, passing=passing)

    @rule()
    def publish(self) -> None:
        self.rig.service.publish()

    @rule(rounds=st.integers(1, 12))
    def go_well(self, rounds: int) -> None:
        """Without this, faults alone would keep most jobs from ever getting far."""
        for _ in range(rounds):
            self._round()

    def _round(self) -> None:
        rig = self.rig
        for late in (True, False):
            while rig.deliver(to_service=True, late=late) or rig.deliver(to_service=False, late=late):
                pass
        while rig.service.commit() or rig.service.finish(0) or rig.service.publish():
            pass
        for _ in range(3):
            rig.scheduler.work()
        rig.tick(1.0)

    # ---- what must always hold
    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        assert self.acknowledged <= set(self.rig.store)
        assert self.acknowledged <= set(self.rig.service.records)

    @invariant()
    def nothing_is_counted_twice(self) -> None:
        for (job, kind, attempt, step), count in self.rig.events.items():
            if kind in (
                "step_metrics",
                "eval_metrics",
                "early_stopped",
                "succeeded",
                "adapter_published",
                "failed",
                "cancelled",
            ):
                assert count == 1, (job, kind, attempt, step, count)

    @invariant()
    def checkpoints_of_the_store_are_on_disk(self) -> None:
        for record in self.rig.store.values():
            assert not record.checkpoint_step or record.checkpoint_step in self.rig.disk[record.id]
            assert 0 <= record.checkpoint_step <= record.step <= record.total_steps

    @invariant()
    def no_job_waits_for_one_that_is_held(self) -> None:
        service = self.rig.service
        queued = {r.id for r in service.records.values() if r.status == JobStatus.QUEUED}
        others = {job for job in queued if service.served.other(service.records[job])}
        held = others | set(service.machine.state.holds)
        first = service.queue.first()
        assert first in queued - held if queued - held else first is None
        for job in queued & held:
            reason = str(service.queue.reason(job))
            assert (
                "its base is" in reason
                if job in others
                else reason == service.machine.state.holds[job].reason
            )

    @invariant()
    def a_job_keeps_its_base(self) -> None:
        for record in self.rig.store.values():
            if record.base is not None:
                assert self.bases.setdefault(record.id, record.base) == record.base

    def teardown(self) -> None:
        self._settle()
        assert self.rig.scheduler.run is None, "a run stands still, although nothing is lost any more"
        for base in model.BASES:  # what only another server can change is changed
            self.rig.kill_scheduler(base)
            self._settle()
        for record in self.rig.store.values():
            self._judge(record)
        assert self.rig.scheduler.run is None and len(self.rig.scheduler.ring) == 0
        assert not self.rig.service.machine.active
        assert not self.rig.shm, "something is left in shared memory"

    def _settle(self) -> None:
        quiet = 0
        for _ in range(ROUNDS):
            self._round()
            quiet = quiet + 1 if self._settled() else 0
            if quiet == 15:  # a process that was killed just now has been heard again by then
                break

    def _judge(self, record: Any) -> None:
        assert record.status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.PAUSED), (
            record,
            self.rig.service.machine.state,
            self.rig.scheduler.run,
        )
        if record.status == JobStatus.SUCCEEDED:
            last = STOPPED_AT if record.hyperparameters.early_stopping_patience else record.total_steps
            assert record.step == record.checkpoint_step == record.last_step == last
            assert last in self.rig.disk[record.id]
            steps = set(range(1, last + 1))
            for kind in ("step_metrics", *["eval_metrics"] * record.evaluates):
                told = {e[3] for e in self.rig.events if e[:2] == (record.id, kind)}
                assert told == steps, f"{kind} of a step were lost"
            if record.evaluates:
                assert record.best_step == min(steps, key=lambda step: LOSSES[step])
                assert self.rig.events[record.id, "early_stopped", None, None] == (last == STOPPED_AT)

    def _settled(self) -> bool:
        service = self.rig.service
        open_jobs = (JobStatus.QUEUED, JobStatus.RUNNING)
        left = [r for r in service.records.values() if r.status in open_jobs]
        return (
            all(service.served.other(record) for record in left)
            and not service.uncommitted
            and self.rig.scheduler.run is None
            and not len(self.rig.scheduler.ring)
            and not self.rig.service.machine.active
        )


Protocol.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestProtocol = Protocol.TestCase

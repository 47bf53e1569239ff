"""A rig of processes that may die and wires that lose, double and delay, around the real run
machine.

Real: ``RunMachine``, the transitions of ``jobs``, the scheduler's ring.  Modelled: the store
(durable at commits only), the disk, shared memory, the wire, and a scheduler that keeps the
protocol of ``managers.scheduler.training.active_run``.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.internal import BatchCursor, SlotRef
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.queue_order import QueueOrder
from sglang_harli.service.jobs.served_base import ServedBase
from sglang_harli.service.jobs.transitions import JobRecord
from sglang_harli.service.run import state as machine
from sglang_harli.service.run.holds import NotNow
from sglang_harli.service.run.machine import RunMachine
from sglang_harli.service.run.state import Effect, Now, Preparation, Unwritten
from support.run_model.scheduler_model import (
    BASES,
    BATCH_BYTES,
    EVALUATION,
    MICRO_BATCHES,
    STATE_BYTES,
    TOTAL_STEPS,
    Scheduler,
)


class FixedPlan:
    """Two micro-batches a step, two steps an epoch; of a job that ``evaluates``, two micro-batches
    are evaluated behind each step."""

    total_steps = TOTAL_STEPS

    def __init__(self, *, evaluates: bool = False) -> None:
        self.evaluates = evaluates

    def behind(self, step: int) -> internal.EvaluationBatches | None:
        return EVALUATION if self.evaluates and step <= TOTAL_STEPS else None

    def evaluation_of(self, step: int) -> BatchCursor | None:
        if step < 1 or self.behind(step) is None:
            return None
        return BatchCursor(epoch=(step - 1) // 2 + 1, step=step, index=MICRO_BATCHES)

    def cursor_after(self, step: int) -> BatchCursor:
        return BatchCursor(epoch=step // 2 + 1, step=step + 1, index=0)

    def following(self, cursor: BatchCursor) -> BatchCursor:
        behind = self.behind(cursor.step)
        if cursor.index + 1 < MICRO_BATCHES + (behind.count if behind else 0):
            return BatchCursor(epoch=cursor.epoch, step=cursor.step, index=cursor.index + 1)
        return self.cursor_after(cursor.step)


@dataclass
class LossyNetwork:
    """What outlives a process: store, disk, shared memory, what is on its way, and what was seen to
    happen."""

    store: dict[str, JobRecord] = field(default_factory=dict)
    disk: dict[str, dict[int, bool]] = field(default_factory=dict)  # job -> step -> whole
    meta: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)  # of a job's checkpoints
    shm: dict[str, int | None] = field(default_factory=dict)  # path -> step of the state in it
    # What a process has sent lives in its connection; what of it came to the other end outlives it
    # there.
    to_service: deque[Any] = field(default_factory=deque)
    to_scheduler: deque[Any] = field(default_factory=deque)
    late_to_service: deque[Any] = field(default_factory=deque)
    late_to_scheduler: deque[Any] = field(default_factory=deque)
    events: Counter[tuple[Any, ...]] = field(default_factory=Counter)  # durable ones
    started: Counter[tuple[str, int]] = field(default_factory=Counter)
    base: BasePrint = BASES[0]  # that is served
    s: float = 1000.0
    names: int = 0

    def __post_init__(self) -> None:
        self.service = Service(self)
        self.scheduler = Scheduler(self)

    @property
    def now(self) -> Now:
        return Now(self.s, self.s)

    def new_name(self) -> int:
        self.names += 1
        return self.names

    # ---- faults
    def kill_service(self) -> None:
        self.late_to_service.clear()
        self.to_service.clear()
        self.late_to_scheduler.extend(self.to_scheduler)
        self.to_scheduler.clear()
        self.service = Service(self)

    def kill_scheduler(self, base: BasePrint | None = None) -> None:
        """``base``: the next one serves another base."""
        self.base = base or self.base
        self.late_to_scheduler.clear()
        self.to_scheduler.clear()
        self.late_to_service.extend(self.to_service)
        self.to_service.clear()
        self.scheduler = Scheduler(self)

    # ---- time
    def tick(self, seconds: float) -> None:
        self.s += seconds
        self.service.tick()
        self.scheduler.tick()

    def deliver(self, *, to_service: bool, late: bool) -> bool:
        wires = (self.late_to_service if late else self.to_service) if to_service else None
        wires = wires if wires is not None else (self.late_to_scheduler if late else self.to_scheduler)
        if not wires:
            return False
        message = wires.popleft()
        (self.service if to_service else self.scheduler).receive(message)
        return True


class Service:
    """The volatile half: records in memory, the machine, what is not committed, work under way."""

    def __init__(self, rig: LossyNetwork) -> None:
        self.rig = rig
        self.pid = rig.new_name()
        self.records = dict(rig.store)
        self.served = ServedBase()
        self.queue = QueueOrder(self.served.other)
        for record in self.records.values():
            self.queue.update(record)
        self.machine = RunMachine(self)
        self.uncommitted: deque[tuple[transitions.Transition, tuple[Effect, ...]]] = deque()
        self.work: list[Any] = []
        self.publications = {r.id for r in self.records.values() if r.publishing}
        self.stale = list(rig.shm)
        self.hello: internal.Hello | None = None
        for record in list(self.records.values()):
            if record.status == JobStatus.RUNNING and not record.publishing:
                self.apply(transitions.interrupted(record, "the service was restarted", 0.0))

    # ---- the book
    def find(self, job: str) -> JobRecord | None:
        return self.records.get(job)

    def next_queued(self) -> JobRecord | None:
        job = self.queue.first()
        return None if job is None else self.records[job]

    def without_base(self) -> list[JobRecord]:
        return [r for r in self.records.values() if r.base is None]

    # ---- effects
    def apply(self, change: transitions.Transition, then: tuple[Effect, ...] = ()) -> None:
        self.records[change.record.id] = change.record
        self.queue.update(change.record)
        self.uncommitted.append((change, then))

    def do(self, effects: list[Effect] | tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case machine.Apply(change, _, then):
                    self.apply(change, then)
                case machine.Send(message):
                    self.send(message)
                case machine.Acknowledge(seq):
                    self.machine.acknowledged(seq)
                    self.send(internal.Ack(seqs=[seq]))
                case machine.HoldJob(job, reason):
                    self.queue.hold(job, reason)
                case machine.ServeBase(base):
                    self.served.serve(base)
                    for record in self.records.values():
                        self.queue.update(record)
                case machine.AskHello():
                    self.send(internal.Welcome(pid=self.pid, answers=0))
                case machine.TakeBack(path):
                    self.rig.shm.pop(path, None)
                case machine.RemoveStale():
                    for path in self.stale:
                        self.rig.shm.pop(path, None)
                case machine.Publish(job):
                    self.publications.add(job)
                case machine.Saved():
                    pass
                case machine.Prepare(job, restore=True) if job in self.machine.state.holds:
                    raise AssertionError("a run was begun that is held")
                case _:
                    self.work.append(effect)

    def send(self, message: Any) -> None:
        assert not (isinstance(message, internal.StartRun) and self.machine.state.hold), "runs are held"
        self.rig.to_scheduler.append(copy.deepcopy(message))

    def settle(self) -> None:
        """What the driver's loop does after each input: what is wanted next, then data."""
        self.do(self.machine.advance(self.rig.now))
        while (cursor := self.machine.next_batch()) is not None:
            run = self.machine.run
            assert run is not None
            batch = internal.MicroBatch(
                job=run.job,
                attempt=run.attempt,
                cursor=cursor,
                micro_batches=MICRO_BATCHES,
                lengths=[1],
                rows=[0],
                step_target_tokens=1,
                evaluation=run.plan.behind(cursor.step),  # type: ignore[union-attr]
            )
            assert cursor.epoch == (cursor.step - 1) // 2 + 1
            self.send(batch)
            self.machine.fed(cursor, BATCH_BYTES)
            assert len(run.ahead) <= machine.MOST_AHEAD, "more is fed ahead than is allowed"

    def receive(self, message: Any) -> None:
        if isinstance(message, internal.Hello):
            self.send(internal.Welcome(pid=self.pid, answers=message.seq))
            self.hello = message
            self.do(self.machine.hello(message, self.rig.now))
        else:
            self.do(self.machine.message(message, self.rig.now))
        self.settle()

    def tick(self) -> None:
        if self.hello is None:
            self.send(internal.Welcome(pid=self.pid, answers=0))
        self.do(self.machine.tick(self.rig.now))
        self.settle()

    # ---- the disk's and the store's answers
    def commit(self) -> bool:
        if not self.uncommitted:
            return False
        change, then = self.uncommitted.popleft()
        record = change.record
        before = self.rig.store.get(record.id)
        assert before is None or not before.status.final or before.status == record.status
        assert not record.checkpoint_step or record.checkpoint_step in self.rig.disk[record.id]
        for draft in change.drafts:
            step = draft.data.get("step") if draft.type in ("step_metrics", "eval_metrics") else None
            attempt = draft.data.get("attempt") if draft.type == "step_metrics" else None
            self.rig.events[record.id, draft.type, attempt, step] += 1
        self.rig.store[record.id] = record
        self.do(then)
        self.settle()
        return True

    def finish(self, index: int, *, ok: bool = True, passing: bool = True) -> bool:
        """Finish one piece of work under way; not ``ok``: what it needs is not there, for a while
        or (``passing`` false) until the server is another."""
        if not self.work:
            return False
        effect = self.work.pop(index % len(self.work))
        now = self.rig.now
        match effect:
            case machine.Prepare(job, attempt) | machine.MakeSlot(job, attempt) if not ok:
                self.do(self.machine.put_off(job, attempt, NotNow("trouble", passing), now))
            case machine.Prepare(job, attempt, _, restore):
                record = self.records[job]
                plan = FixedPlan(evaluates=record.evaluates)
                found = self._restore(record, plan) if restore else Preparation(plan)
                self.do(self.machine.prepared(job, attempt, found, now))
            case machine.MakeSlot(job, attempt, nbytes):
                ref = self._new_slot(None)
                self.do(self.machine.slot_made(job, attempt, SlotRef(path=ref, nbytes=nbytes)))
            case machine.SaveSnapshot(message):
                if ok := ok and message.slot.path in self.rig.shm:
                    assert self.rig.shm[message.slot.path] == message.step, (
                        "a slot was written while it was read"
                    )
                    self.rig.disk.setdefault(message.job, {})[message.step] = True
                    self.rig.meta[message.job, message.step] = message.meta
                self.do(self.machine.snapshot_written(message, None if ok else Unwritten("full", False), now))
        self.settle()
        return True

    def _new_slot(self, step: int | None) -> str:
        path = f"slot-{self.rig.new_name()}"
        self.rig.shm[path] = step
        return path

    def _restore(self, record: JobRecord, plan: FixedPlan) -> Preparation:
        steps = self.rig.disk.setdefault(record.id, {})
        damage = ""
        for step in sorted(steps, reverse=True):
            if step > record.checkpoint_step:
                continue
            if not steps[step]:
                damage = f"step {step} is damaged"
                continue
            if step == record.last_step and record.complete:
                return Preparation(None, trained=True)
            ref = SlotRef(path=self._new_slot(step), nbytes=STATE_BYTES)
            return Preparation(plan, step, step, ref, dict(self.rig.meta[record.id, step]), damage)
        return Preparation(plan, damage=damage)

    def publish(self) -> bool:
        if not self.publications:
            return False
        ready = sorted(job for job in self.publications if not self.served.other(self.records[job]))
        if not ready:
            return False
        self.publications.remove(ready[0])
        record = self.records[ready[0]]
        if record.publishing:
            self.apply(transitions.published(record, self.rig.s))
            self.settle()
        return True


def new_job(number: int, base: BasePrint | None = None) -> JobRecord:
    """The second and the third evaluate; the third's evaluations end it at step STOPPED_AT."""
    patience = 1 if number == 3 else None
    return JobRecord(
        id=f"ftjob-{number:024d}",
        number=number,
        created_at=0.0,
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(early_stopping_patience=patience),
        model="m",
        adapter_name=f"m-ft-{number}",
        total_steps=TOTAL_STEPS,
        data={"rows": 2, "validation_rows": 1} if number > 1 else {},
        base=base,
    )

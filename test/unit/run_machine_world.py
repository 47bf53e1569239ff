"""A world of processes that may die and wires that lose, double and delay, around the real run machine.

Real: ``RunMachine``, the transitions of ``jobs``, the scheduler's ring.  Modelled: the store (durable at commits
only), the disk, shared memory, the wire, and a scheduler that keeps the protocol of ``managers.active_run``.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.managers.unacknowledged import KEPT, Unacknowledged
from sglang_harli.protocol import internal
from sglang_harli.protocol.internal import BatchCursor, SlotRef
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service import jobs
from sglang_harli.service import run_machine_state as machine
from sglang_harli.service.jobs import JobRecord
from sglang_harli.service.run_machine import RunMachine
from sglang_harli.service.run_machine_state import Effect, Now, Preparation
from support.service_peers import limits

TOTAL_STEPS, MICRO_BATCHES, EVERY = 4, 2, 2
STATE_BYTES = 64
LIMITS = limits()


class FixedPlan:
    """Two micro-batches a step, two steps an epoch."""

    total_steps = TOTAL_STEPS

    def cursor_after(self, step: int) -> BatchCursor:
        return BatchCursor(epoch=step // 2 + 1, step=step + 1, index=0)

    def following(self, cursor: BatchCursor) -> BatchCursor:
        if cursor.index + 1 < MICRO_BATCHES:
            return BatchCursor(epoch=cursor.epoch, step=cursor.step, index=cursor.index + 1)
        return self.cursor_after(cursor.step)


@dataclass
class World:
    """What outlives a process: store, disk, shared memory, what is on its way, and what was seen to happen."""

    store: dict[str, JobRecord] = field(default_factory=dict)
    disk: dict[str, dict[int, bool]] = field(default_factory=dict)  # job -> step -> whole
    shm: dict[str, int | None] = field(default_factory=dict)  # path -> step of the state in it
    # What a process has sent lives in its connection; what of it came to the other end outlives it there.
    to_service: deque[Any] = field(default_factory=deque)
    to_scheduler: deque[Any] = field(default_factory=deque)
    late_to_service: deque[Any] = field(default_factory=deque)
    late_to_scheduler: deque[Any] = field(default_factory=deque)
    events: Counter[tuple[Any, ...]] = field(default_factory=Counter)  # durable ones
    started: Counter[tuple[str, int]] = field(default_factory=Counter)
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

    def kill_scheduler(self) -> None:
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

    def __init__(self, world: World) -> None:
        self.world = world
        self.pid = world.new_name()
        self.records = dict(world.store)
        self.machine = RunMachine(self)
        self.uncommitted: deque[tuple[jobs.Change, tuple[Effect, ...]]] = deque()
        self.work: list[Any] = []
        self.publications = {r.id for r in self.records.values() if r.publishing}
        self.stale = list(world.shm)
        self.hello: internal.Hello | None = None
        for record in list(self.records.values()):
            if record.status == JobStatus.RUNNING and not record.publishing:
                self.apply(jobs.interrupted(record, "the service was restarted"))

    # ---- the book
    def find(self, job: str) -> JobRecord | None:
        return self.records.get(job)

    def next_queued(self) -> JobRecord | None:
        queued = [r for r in self.records.values() if r.status == JobStatus.QUEUED]
        return min(queued, key=lambda r: r.number, default=None)

    # ---- effects
    def apply(self, change: jobs.Change, then: tuple[Effect, ...] = ()) -> None:
        self.records[change.record.id] = change.record
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
                case machine.AskHello():
                    self.send(internal.Welcome(pid=self.pid, answers=0))
                case machine.TakeBack(path):
                    self.world.shm.pop(path, None)
                case machine.RemoveStale():
                    for path in self.stale:
                        self.world.shm.pop(path, None)
                case machine.Publish(job):
                    self.publications.add(job)
                case machine.Saved():
                    pass
                case _:
                    self.work.append(effect)

    def send(self, message: Any) -> None:
        self.world.to_scheduler.append(copy.deepcopy(message))

    def settle(self) -> None:
        """What the driver's loop does after each input: what is wanted next, then data."""
        self.do(self.machine.advance(self.world.now))
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
            )
            assert cursor.epoch == (cursor.step - 1) // 2 + 1
            self.send(batch)
            self.machine.fed(cursor)

    def receive(self, message: Any) -> None:
        if isinstance(message, internal.Hello):
            self.send(internal.Welcome(pid=self.pid, answers=message.seq))
            self.hello = message
            self.do(self.machine.hello(message, self.world.now))
        else:
            self.do(self.machine.message(message, self.world.now))
        self.settle()

    def tick(self) -> None:
        if self.hello is None:
            self.send(internal.Welcome(pid=self.pid, answers=0))
        self.do(self.machine.tick(self.world.now))
        self.settle()

    # ---- the disk's and the store's answers
    def commit(self) -> bool:
        if not self.uncommitted:
            return False
        change, then = self.uncommitted.popleft()
        record = change.record
        before = self.world.store.get(record.id)
        assert before is None or not before.status.final or before.status == record.status
        assert not record.checkpoint_step or record.checkpoint_step in self.world.disk[record.id]
        for draft in change.drafts:
            step = draft.data.get("step") if draft.type == "step_metrics" else None
            self.world.events[record.id, draft.type, draft.data.get("attempt") if step else None, step] += 1
        self.world.store[record.id] = record
        self.do(then)
        self.settle()
        return True

    def finish(self, index: int, *, ok: bool = True) -> bool:
        """Finish one piece of work under way."""
        if not self.work:
            return False
        effect = self.work.pop(index % len(self.work))
        now = self.world.now
        match effect:
            case machine.Prepare(job, attempt, _, restore):
                found = self._restore(self.records[job]) if restore else Preparation(FixedPlan())
                self.do(self.machine.prepared(job, attempt, found, now))
            case machine.MakeSlot(job, attempt, nbytes):
                ref = self._new_slot(None)
                self.do(self.machine.slot_made(job, attempt, SlotRef(path=ref, nbytes=nbytes)))
            case machine.SaveSnapshot(message):
                if ok := ok and message.slot.path in self.world.shm:
                    assert self.world.shm[message.slot.path] == message.step, (
                        "a slot was written while it was read"
                    )
                    self.world.disk.setdefault(message.job, {})[message.step] = True
                self.do(self.machine.snapshot_written(message, ok, now))
        self.settle()
        return True

    def _new_slot(self, step: int | None) -> str:
        path = f"slot-{self.world.new_name()}"
        self.world.shm[path] = step
        return path

    def _restore(self, record: JobRecord) -> Preparation:
        steps = self.world.disk.setdefault(record.id, {})
        damage = ""
        for step in sorted(steps, reverse=True):
            if step > record.checkpoint_step:
                continue
            if not steps[step]:
                damage = f"step {step} is damaged"
                continue
            if step == record.total_steps:
                return Preparation(None, trained=True)
            ref = SlotRef(path=self._new_slot(step), nbytes=STATE_BYTES)
            return Preparation(FixedPlan(), step, step, ref, {"tokens": step}, damage)
        return Preparation(FixedPlan(), damage=damage)

    def publish(self) -> bool:
        if not self.publications:
            return False
        record = self.records[self.publications.pop()]
        if record.publishing:
            self.apply(jobs.published(record, self.world.s))
            self.settle()
        return True


@dataclass
class Held:
    """A run as ``ActiveRun`` has it."""

    job: str
    attempt: int
    applied: int
    restore: str | None
    cursor: tuple[int, int] = (1, 0)
    ready: bool = False
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    slot: str | None = None
    slot_free: bool = False
    saved: int = 0
    told: int = 0
    wanted: str | None = None
    in_hand: internal.SnapshotReady | None = None
    stopping: bool = False
    save_first: bool = False

    @property
    def finished(self) -> bool:
        return self.applied >= TOTAL_STEPS


class Scheduler:
    """The scheduler's half of the protocol, with counting in place of training."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pid = world.new_name()
        self.seq = self.pid * 1_000_000
        self.ring = Unacknowledged()
        self.run: Held | None = None
        self.attempts: dict[str, int] = {}
        self.service_pid: int | None = None
        self.pulse_at = 0.0

    # ---- out
    def send(self, message: Any) -> None:
        self.seq += 1
        message.seq = self.seq
        if isinstance(message, KEPT):
            self.ring.keep(message, self.world.s)
        if self.service_pid is not None:
            self.world.to_service.append(copy.deepcopy(message))

    def hello(self) -> None:
        run = self.run
        self.seq += 1
        message = internal.Hello(pid=self.pid, rank=0, limits=LIMITS, seq=self.seq)
        if run is not None:
            message.job, message.attempt, message.step = run.job, run.attempt, run.applied
            message.next_cursor = self._cursor(run)
        self.world.to_service.append(message)

    def _cursor(self, run: Held) -> BatchCursor:
        return BatchCursor(epoch=1, step=run.cursor[0], index=run.cursor[1])  # its epoch may be out of date

    def tick(self) -> None:
        if self.service_pid is None:
            self.hello()
            return
        for kept in self.ring.due(self.world.s):
            self.world.to_service.append(copy.deepcopy(kept))
        run = self.run
        if run is not None and self.world.s - self.pulse_at >= 2:
            self.pulse_at = self.world.s
            if run.in_hand is not None and run.in_hand not in self.ring:
                self.send(run.in_hand)
            self.send(
                internal.Pulse(
                    job=run.job,
                    attempt=run.attempt,
                    step=run.applied,
                    next_cursor=self._cursor(run),
                    state_bytes=STATE_BYTES if run.ready else 0,
                    has_slot=run.slot is not None,
                    snapshot=-1 if run.in_hand is None else run.in_hand.step,
                    stopping=run.stopping,
                )
            )

    # ---- in
    def receive(self, message: Any) -> None:
        run = self.run
        match message:
            case internal.Welcome():
                new, self.service_pid = message.pid != self.service_pid, message.pid
                if new or not message.answers:
                    for kept in self.ring.all():
                        self.world.to_service.append(copy.deepcopy(kept))
                if not message.answers:
                    self.hello()
            case internal.Ack():
                self.ring.acknowledged(message.seqs, self.world.s)
            case internal.StartRun():
                self._start(message)
            case internal.StopRun() if run is None or (run.job, run.attempt) != (
                message.job,
                message.attempt,
            ):
                self.attempts[message.job] = max(message.attempt, self.attempts.get(message.job, 0))
                self.send(internal.RunStopped(job=message.job, attempt=message.attempt, step=0))
            case _ if run is not None and (run.job, run.attempt) == (message.job, message.attempt):
                self._of_run(run, message)

    def _start(self, message: internal.StartRun) -> None:
        spec = message.spec
        if spec.attempt <= self.attempts.get(spec.job, 0) or message.scheduler != self.pid:
            return
        self.attempts[spec.job] = spec.attempt
        self.run = None
        path = message.restore.path if message.restore else None
        assert path is None or self.world.shm.get(path) == message.step, (
            "the restore slot is not what was saved"
        )
        self.world.started[spec.job, spec.attempt] += 1
        assert self.world.started[spec.job, spec.attempt] == 1, "one attempt trained twice"
        self.run = Held(
            spec.job, spec.attempt, message.step, path, cursor=(message.step + 1, 0), saved=message.step
        )
        self.run.told = message.step

    def _of_run(self, run: Held, message: Any) -> None:
        if isinstance(message, internal.MicroBatch):
            place = (message.cursor.step, message.cursor.index)
            if place == run.cursor:
                run.queue.append(place)
                last = place[1] + 1 == MICRO_BATCHES
                run.cursor = (place[0] + 1, 0) if last else (place[0], place[1] + 1)
        elif isinstance(message, internal.SnapshotSlot):
            if run.slot != message.slot.path:
                run.slot, run.slot_free = message.slot.path, True
        elif isinstance(message, internal.SnapshotSaved):
            self._saved(run, message)
        elif isinstance(message, internal.StopRun):
            run.stopping, run.save_first = True, message.snapshot
            if not run.ready or not message.snapshot or run.applied == run.saved:
                self._stop(run)
            else:
                run.queue.clear()  # a micro-batch in flight is dropped; those behind it stay with the service
                run.cursor = (run.applied + 1, 0)
                run.wanted = "pause"

    def _saved(self, run: Held, message: internal.SnapshotSaved) -> None:
        in_hand = run.in_hand is not None and run.in_hand.step == message.step
        if not in_hand and not message.ok:
            return
        if in_hand:
            run.in_hand, run.slot_free = None, True
        if message.ok:
            assert message.step in self.world.disk[run.job]
            run.saved = max(run.saved, message.step)
        behind = run.applied > run.saved
        if behind and (run.save_first or run.finished):
            run.wanted = "pause" if run.save_first else "final"
        elif run.stopping:
            self._stop(run)
        elif run.finished and not behind:
            self.run = None

    def _stop(self, run: Held) -> None:
        self.run = None
        self.send(internal.RunStopped(job=run.job, attempt=run.attempt, step=run.applied, after=run.told))

    # ---- work
    def work(self) -> bool:
        """One quantum: announce, copy, or train a micro-batch."""
        run = self.run
        if run is None:
            return False
        if not run.ready:
            run.ready = True
            self.send(
                internal.RunStarted(
                    job=run.job, attempt=run.attempt, step=run.applied, state_bytes=STATE_BYTES
                )
            )
            return True
        if run.wanted and run.slot_free and run.slot is not None:
            self._copy(run)
            return True
        if run.stopping or run.finished or not run.queue:
            return False
        step, index = run.queue.popleft()
        assert step == run.applied + 1
        if index + 1 == MICRO_BATCHES:
            self._applied(run)
        return True

    def _copy(self, run: Held) -> None:
        reason, run.wanted = run.wanted or "every", None
        if run.applied == run.saved and reason != "final":
            return
        assert run.slot is not None
        self.world.shm[run.slot] = run.applied
        run.slot_free = False
        run.in_hand = internal.SnapshotReady(
            job=run.job,
            attempt=run.attempt,
            step=run.applied,
            slot=SlotRef(path=run.slot, nbytes=STATE_BYTES),
            meta={"tokens": run.applied},
            reason=reason,
            after=run.told,
        )
        self.send(run.in_hand)

    def _applied(self, run: Held) -> None:
        run.applied += 1
        done = internal.StepDone(
            job=run.job,
            attempt=run.attempt,
            step=run.applied,
            epoch=(run.applied - 1) // 2 + 1,
            loss=1.0,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=1,
            target_tokens=1,
            seconds=0.1,
            total_tokens=run.applied,
            after=run.told,
        )
        run.told = run.applied
        self.send(done)
        if run.finished:
            run.wanted = "final"
        elif run.applied % EVERY == 0 and run.slot_free:
            run.wanted = "every"


def new_job(number: int) -> JobRecord:
    return JobRecord(
        id=f"ftjob-{number:024d}",
        number=number,
        created_at=0.0,
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(),
        model="m",
        adapter_name=f"m-ft-{number}",
        total_steps=TOTAL_STEPS,
        data={},
    )

"""The scheduler's half of the protocol, as ``managers.scheduler.training.active_run`` keeps it,
with counting in place of training."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_harli.managers.scheduler.unacknowledged import KEPT, Unacknowledged
from sglang_harli.protocol import internal
from sglang_harli.protocol.internal import BatchCursor, SlotRef
from sglang_harli.service.run import state
from support.service.service_peers import limits

if TYPE_CHECKING:
    from support.run_model.run_simulation import LossyNetwork

TOTAL_STEPS, MICRO_BATCHES, EVERY = 4, 2, 2
EVALUATION = internal.EvaluationBatches(count=2, sampled=1, whole=True)
LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: 0.5}  # what an evaluation of each step finds
STOPPED_AT = 3  # by a patience of 1
BATCH_BYTES = 1
STATE_BYTES = 64
LIMITS = limits()
BASES = tuple(
    internal.BasePrint(
        model="m", path=f"m/{number}", dtype="float32", math={}, weights={"x": (number,)}, digest=str(number)
    )
    for number in (1.0, 2.0)
)


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
    patience: int | None = None
    evaluation: internal.EvaluationState = field(default_factory=internal.EvaluationState)
    evaluated: int = 0  # told last
    slot: str | None = None
    slot_free: bool = False
    saved: int = 0
    told: int = 0
    wanted: str | None = None
    in_hand: internal.SnapshotReady | None = None
    stopping: bool = False
    save_first: bool = False

    @property
    def taken(self) -> tuple[int, int]:
        return self.queue[0] if self.queue else self.cursor

    @property
    def evaluating(self) -> bool:
        return 0 < self.applied == self.taken[0]

    @property
    def finished(self) -> bool:
        stops = self.evaluation.stops(self.patience, TOTAL_STEPS)
        return stops or (self.applied >= TOTAL_STEPS and not self.evaluating)


class Scheduler:
    """The scheduler's half of the protocol, with counting in place of training."""

    def __init__(self, rig: LossyNetwork) -> None:
        self.rig = rig
        self.pid = rig.new_name()
        self.seq = self.before = self.pid * 1_000_000
        self.ring = Unacknowledged()
        self.run: Held | None = None
        self.attempts: dict[str, int] = {}
        self.service_pid: int | None = None
        self.pulse_at = 0.0
        self.hold = ""  # why no run is to start
        self.base, self.updates = rig.base, 0

    # ---- out
    def send(self, message: Any) -> None:
        self.seq += 1
        message.seq = self.seq
        if isinstance(message, KEPT):
            self.ring.keep(message, self.rig.s)
        if self.service_pid is not None:
            self.rig.to_service.append(copy.deepcopy(message))

    def hello(self) -> None:
        run = self.run
        self.seq += 1
        message = internal.Hello(
            pid=self.pid,
            rank=0,
            limits=LIMITS,
            seq=self.seq,
            hold=self.hold,
            base=self.base,
            updates=self.updates,
        )
        if run is not None:
            message.job, message.attempt, message.step = run.job, run.attempt, run.applied
            message.next_cursor, message.taken = self._cursor(run), self._taken(run)
        self.rig.to_service.append(message)

    def _cursor(self, run: Held) -> BatchCursor:
        return BatchCursor(epoch=1, step=run.cursor[0], index=run.cursor[1])  # its epoch may be out of date

    def _taken(self, run: Held) -> BatchCursor:
        step, index = run.taken
        return BatchCursor(epoch=1, step=step, index=index)

    def tick(self) -> None:
        if self.service_pid is None:
            self.hello()
            return
        for kept in self.ring.due(self.rig.s):
            self.rig.to_service.append(copy.deepcopy(kept))
        run = self.run
        if run is not None and self.rig.s - self.pulse_at >= 2:
            self.pulse_at = self.rig.s
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
                    taken=self._taken(run),
                )
            )

    # ---- in
    def receive(self, message: Any) -> None:
        run = self.run
        match message:
            case internal.Welcome() if not 0 < message.answers <= self.before:
                new, self.service_pid = message.pid != self.service_pid, message.pid
                if new or not message.answers:
                    for kept in self.ring.all():
                        self.rig.to_service.append(copy.deepcopy(kept))
                if not message.answers:
                    self.hello()
            case internal.Ack():
                self.ring.acknowledged(message.seqs, self.rig.s)
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
        if self.hold or message.updates != self.updates:
            self.hello()
            return
        base = self.rig.store[spec.job].base
        assert base is not None and base.digest == self.base.digest, "a job is trained on another base"
        self.attempts[spec.job] = spec.attempt
        self.run = None
        path = message.restore.path if message.restore else None
        assert path is None or self.rig.shm.get(path) == message.step, (
            "the restore slot is not what was saved"
        )
        self.rig.started[spec.job, spec.attempt] += 1
        assert self.rig.started[spec.job, spec.attempt] == 1, "one attempt trained twice"
        assert message.begin is not None
        cursor = (message.begin.step, message.begin.index)
        self.run = Held(spec.job, spec.attempt, message.step, path, cursor=cursor, saved=message.step)
        self.run.told, self.run.patience = message.step, spec.hyperparameters.early_stopping_patience
        self.run.evaluation = internal.state_in(message.meta)
        self.run.evaluated = self.run.evaluation.step
        assert self.run.evaluated <= message.step, "a run knows evaluations that are to come"

    def _of_run(self, run: Held, message: Any) -> None:
        if isinstance(message, internal.MicroBatch):
            place = (message.cursor.step, message.cursor.index)
            if place == run.cursor:
                run.queue.append(place)
                assert len(run.queue) <= state.MOST_AHEAD
                run.cursor = (place[0] + 1, 0) if message.last else (place[0], place[1] + 1)
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
                run.cursor = (run.applied, MICRO_BATCHES) if run.evaluating else (run.applied + 1, 0)
                run.wanted = "pause"

    def _saved(self, run: Held, message: internal.SnapshotSaved) -> None:
        in_hand = run.in_hand is not None and run.in_hand.step == message.step
        if not in_hand and not message.ok:
            return
        if in_hand:
            run.in_hand, run.slot_free = None, True
        if message.ok:
            assert message.step in self.rig.disk[run.job]
            run.saved = max(run.saved, message.step)
        behind = run.applied > run.saved
        if behind and (run.save_first or run.finished):
            run.wanted = "pause" if run.save_first else "final"
        elif run.stopping:
            self._stop(run)
        elif run.finished and not behind:
            self.run = None

    def _stop(self, run: Held, reason: str = "") -> None:
        self.run = None
        self.send(
            internal.RunStopped(
                job=run.job,
                attempt=run.attempt,
                step=run.applied,
                after=run.told,
                reason=reason,
                evaluated=run.evaluated,
            )
        )

    def hold_runs(self, reason: str) -> None:
        """Take no run for a while, or (``""``) again; what a hello says and is lost comes with the
        next one."""
        self.hold = reason
        self.hello()

    def update_weights(self, base: internal.BasePrint) -> None:
        """SGLang's update, which is refused while a job trains."""
        if self.run is None:
            self.rig.base = self.base = base
            self.updates += 1
            self.hello()

    def give_up(self) -> None:
        """Requests need the memory of the run."""
        if self.run is not None:
            self._stop(self.run, "memory_pressure: requests needed it")

    def fail(self, *, passing: bool, code: str = "internal") -> None:
        """Trouble in the scheduler's process ends the run."""
        if self.run is not None:
            run, self.run = self.run, None
            failed = internal.RunFailed(
                job=run.job, attempt=run.attempt, step=run.applied, code=code, message="EMFILE"
            )
            failed.after, failed.passing, failed.evaluated = run.told, passing, run.evaluated
            self.send(failed)

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
        if run.stopping or run.finished or run.wanted == "best" or not run.queue:
            return False  # the best state is copied before it is replaced
        step, index = run.queue.popleft()
        if step == run.applied:
            self._evaluated(run, index)
            return True
        assert step == run.applied + 1
        if index + 1 == MICRO_BATCHES:
            self._applied(run)
        else:
            taken = internal.BatchesTaken(job=run.job, attempt=run.attempt, cursor=self._taken(run))
            self.send(taken)
        return True

    def _copy(self, run: Held) -> None:
        reason, run.wanted = run.wanted or "every", None
        if run.applied == run.saved and reason != "final":
            return
        assert run.slot is not None
        self.rig.shm[run.slot] = run.applied
        run.slot_free = False
        run.in_hand = internal.SnapshotReady(
            job=run.job,
            attempt=run.attempt,
            step=run.applied,
            slot=SlotRef(path=run.slot, nbytes=STATE_BYTES),
            meta={"tokens": run.applied, internal.EVALUATION: msgspec.to_builtins(run.evaluation)},
            reason=reason,
            after=run.told,
            evaluated=run.evaluated,
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
            evaluated=run.evaluated,
        )
        run.told = run.applied
        self.send(done)
        if not run.evaluating:
            self._snapshot_due(run)

    def _evaluated(self, run: Held, index: int) -> None:
        assert run.evaluation.step < run.applied, "a step was evaluated twice"
        if index + 1 < MICRO_BATCHES + EVALUATION.count:
            taken = internal.BatchesTaken(job=run.job, attempt=run.attempt, cursor=self._taken(run))
            self.send(taken)
            return
        loss = LOSSES[run.applied]
        run.evaluation = run.evaluation.after(run.applied, loss, 0.0)
        run.evaluated = run.applied
        self.send(
            internal.EvaluationDone(
                job=run.job,
                attempt=run.attempt,
                step=run.applied,
                epoch=1,
                valid_loss=loss,
                valid_mean_token_accuracy=0.5,
                rows=1,
                target_tokens=1,
                state=run.evaluation,
                after=run.told,
            )
        )
        self._snapshot_due(run)

    def _snapshot_due(self, run: Held) -> None:
        if run.finished:
            run.wanted = "final"
        elif run.evaluation.best_step == run.applied > run.saved:
            run.wanted = "best"
        elif run.applied % EVERY == 0 and run.slot_free:
            run.wanted = "every"

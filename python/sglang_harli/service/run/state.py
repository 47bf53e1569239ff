"""What the run machine knows, and what it asks to have done (pure: see ``run_machine``)."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.internal import BatchCursor, ServedLimits, SlotRef
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.transitions import DesiredState, JobRecord, Transition

SAY_AGAIN_S = 5.0  # a StartRun or StopRun without an answer
# Micro-batches sent and not done: at most so many, and BYTES_AHEAD bytes unless under LEAST_AHEAD.
LEAST_AHEAD, MOST_AHEAD = 2, 32
BYTES_AHEAD = 16 << 20
IN_PASSING = ("every", "best")  # reasons of snapshots behind which training goes on
SILENT_S = 10.0  # nothing was heard of a run for so long: the scheduler is asked for a hello


class Phase(enum.Enum):
    PREPARING = "preparing"  # data and checkpoint are being read
    STARTING = "starting"  # StartRun is said
    TRAINING = "training"
    STOPPING = "stopping"  # a run that the store does not want


@dataclass(frozen=True, slots=True)
class Now:
    """``wall``: for stamps that people read; ``s``: monotonic, for all that is waited for."""

    wall: float
    s: float


class JobLookup(Protocol):
    """The jobs as they are in memory."""

    def find(self, job: str) -> JobRecord | None: ...
    def next_queued(self) -> JobRecord | None: ...
    def without_base(self) -> list[JobRecord]: ...


class Plan(Protocol):
    """Which micro-batch comes when."""

    total_steps: int

    def cursor_after(self, step: int) -> BatchCursor: ...
    def following(self, cursor: BatchCursor) -> BatchCursor: ...
    def evaluation_of(self, step: int) -> BatchCursor | None: ...


# ------------------------------------------------------------------ what is to be done
@dataclass(frozen=True, slots=True)
class Apply:
    """A transition.  ``then`` is done when it is durable."""

    change: Transition
    urgent: bool = True
    then: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Send:
    message: internal.Message


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The scheduler's message ``seq`` need not come again."""

    seq: int


@dataclass(frozen=True, slots=True)
class HoldJob:
    """Pass a job over while it is queued, for a reason that is shown; see ``QueueOrder.hold``."""

    job: str
    reason: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class ServeBase:
    """The served base changed; None: it is not known.  Which jobs may start changes with it."""

    base: BasePrint | None


@dataclass(frozen=True, slots=True)
class AskHello:
    """Have the scheduler say which run it holds."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Read the job's data and, with ``restore``, its checkpoint.  Answered by ``prepared``,
    ``not_prepared`` or ``put_off``."""

    job: str
    attempt: int
    limits: ServedLimits
    restore: bool


@dataclass(frozen=True, slots=True)
class MakeSlot:
    """Answered by ``slot_made``, ``slot_refused`` or ``put_off``."""

    job: str
    attempt: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SaveSnapshot:
    """Write it to disk; answered by ``snapshot_written``."""

    message: internal.SnapshotReady


@dataclass(frozen=True, slots=True)
class Saved:
    """The store knows the checkpoint: older ones may go."""

    job: str


@dataclass(frozen=True, slots=True)
class Publish:
    job: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Remove a file from shared memory."""

    path: str


@dataclass(frozen=True, slots=True)
class RemoveStale:
    """Remove the slots that an earlier service made: no run uses them."""


Effect = (
    Apply
    | Send
    | Acknowledge
    | HoldJob
    | ServeBase
    | AskHello
    | Prepare
    | MakeSlot
    | SaveSnapshot
    | Saved
    | Publish
    | TakeBack
    | RemoveStale
)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What ``Prepare`` found: rows, and the checkpoint to go on from (0 and None: from nothing)."""

    plan: Plan | None  # None: nothing is left to train
    step: int = 0
    tokens: int = 0
    restore: SlotRef | None = None  # the checkpoint's slot
    meta: dict[str, Any] = field(default_factory=dict)
    damage: str = ""  # why newer checkpoints cannot be used
    trained: bool = False  # the last step's checkpoint is there and whole
    data: dict[str, Any] | None = None  # with total_steps: of rows that were made again
    total_steps: int = 0


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Why a snapshot was given up."""

    why: str
    lasting: bool = False  # it would be the next time, too


# ------------------------------------------------------------------ what is known
@dataclass
class Run:
    """What the service knows of the run in progress."""

    job: str
    attempt: int
    phase: Phase
    scheduler_pid: int
    adopting: bool = False  # the scheduler already held it
    plan: Plan | None = None
    next_cursor: BatchCursor | None = None
    applied: int = 0  # the last optimizer step that is known to be applied
    taken: tuple[int, int] = (0, 0)  # step and index of the first micro-batch not known to be done
    ahead: deque[tuple[tuple[int, int], int]] = field(default_factory=deque)  # from there on, with bytes
    asked: DesiredState = DesiredState.RUN  # the desired state that was sent last
    start: internal.StartRun | None = None  # sent last; again at sent_at_s + SAY_AGAIN_S
    stop: internal.StopRun | None = None  # as ``start``
    sent_at_s: float = 0.0
    heard_at_s: float = 0.0  # of the scheduler's last message about it
    slot: SlotRef | None = None  # of snapshots; ours between SnapshotReady and SnapshotSaved
    making_slot: bool = False
    restore: SlotRef | None = None
    seen_behind: tuple[int, int] | None = None  # the last pulse's cursor, if behind ours
    told_sub_state: str = ""
    told_at_s: float = float("-inf")

    def has_applied(self, step: int) -> None:
        """The scheduler has applied this step, and is done with its micro-batches."""
        self.applied = max(self.applied, step)
        evaluation = self.plan.evaluation_of(self.applied) if self.plan is not None else None
        if evaluation is not None:
            self.has_taken(*_place(evaluation))
        elif self.plan is not None:
            self.has_taken(self.applied + 1, 0)

    def has_evaluated(self, step: int) -> None:
        """The scheduler is done with what is evaluated behind this step."""
        self.has_taken(step + 1, 0)

    def has_taken(self, step: int, index: int) -> None:
        """The scheduler is done with the micro-batches before that one."""
        self.taken = max(self.taken, (step, index))
        while self.ahead and self.ahead[0][0] < self.taken:
            self.ahead.popleft()

    def take_plan(self, plan: Plan) -> None:
        """The order of its micro-batches is known."""
        self.plan = plan
        self.has_applied(self.applied)

    def fed(self, nbytes: int) -> None:
        """The micro-batch at ``next_cursor`` was sent."""
        assert self.plan is not None and self.next_cursor is not None
        self.ahead.append((_place(self.next_cursor), nbytes))
        self.next_cursor = self.plan.following(self.next_cursor)

    def go_back(self, cursor: BatchCursor) -> None:
        """What was sent from ``cursor`` on was lost."""
        self.next_cursor = cursor
        while self.ahead and self.ahead[-1][0] >= _place(cursor):
            self.ahead.pop()

    def go_on(self, cursor: BatchCursor) -> None:
        """The scheduler has what another process sent it before ``cursor``.  Their bytes are not
        known: each counts as all that are allowed."""
        assert self.plan is not None
        step, index = self.taken
        held, self.next_cursor = BatchCursor(epoch=cursor.epoch, step=step, index=index), cursor
        while _place(held) < _place(cursor):
            self.ahead.append((_place(held), BYTES_AHEAD))
            held = self.plan.following(held)

    @property
    def enough_ahead(self) -> bool:
        """See ``MOST_AHEAD``."""
        count = len(self.ahead)
        return count >= MOST_AHEAD or (
            count >= LEAST_AHEAD and sum(nbytes for _, nbytes in self.ahead) >= BYTES_AHEAD
        )


def _place(cursor: BatchCursor) -> tuple[int, int]:
    return cursor.step, cursor.index


@dataclass(frozen=True, slots=True)
class Hold:
    """A queued job does not start before ``until_s`` (infinity: not with this scheduler)."""

    reason: str
    until_s: float


@dataclass
class Writing:
    """A snapshot on its way to disk."""

    path: str  # the slot it lies in
    seqs: set[int]  # of the messages that announced it
    orphaned: bool = False  # its run is over: the slot goes when it is written
    delayed: str = ""  # why it is not written yet


@dataclass
class State:
    """What the run machine knows between two inputs."""

    book: JobLookup
    run: Run | None = None
    greeted: bool = False  # a hello was read, and the scheduler has not said that it ends
    hello_seq: int = 0  # of the newest hello
    scheduler_pid: int = 0
    limits: ServedLimits | None = None
    base: BasePrint | None = None  # what the scheduler serves
    base_unknown: bool = False  # since an update of the weights
    updates: int = 0  # of the weights so far
    hold: str = ""  # why the scheduler takes no run now
    asked_at_s: float = float("-inf")  # when ``hold`` was asked last
    holds: dict[str, Hold] = field(default_factory=dict)  # queued jobs that are passed over
    troubles: dict[str, int] = field(default_factory=dict)  # in a row, by job
    lacking: dict[str, tuple[int, int]] = field(default_factory=dict)  # step without memory, times in a row
    writing: dict[tuple[str, int, int], Writing] = field(default_factory=dict)  # job, attempt, step
    given_up: tuple[str, int, int] | None = None  # the last snapshot that was not written
    unstored: set[int] = field(default_factory=set)  # StepDones that are not durable

    def named(self, message: Any) -> Run | None:
        """The run in progress, if the message is about this job and attempt."""
        run = self.run
        return run if run and (run.job, run.attempt) == (message.job, message.attempt) else None

    def running(self, run: Run) -> JobRecord | None:
        """The run's record, if the store wants this very attempt to train."""
        record = self.book.find(run.job)
        if record is None or record.attempt != run.attempt or record.publishing:
            return None
        return record if record.status == JobStatus.RUNNING else None

    # ---- common answers
    def stop(self, run: Run, now: Now, *, snapshot: bool) -> list[Effect]:
        run.stop = internal.StopRun(job=run.job, attempt=run.attempt, snapshot=snapshot)
        run.sent_at_s = now.s
        return [Send(run.stop)]

    def unwanted(self, run: Run, now: Now, *, snapshot: bool = False) -> list[Effect]:
        """Stop it; the job's record is settled already or is none of its business."""
        run.phase = Phase.STOPPING
        return self.stop(run, now, snapshot=snapshot)

    def lost(self, run: Run, why: str, now: Now) -> list[Effect]:
        """The scheduler does not hold the run any more."""
        record = self.running(run)
        effects: list[Effect] = []
        if record is not None:
            effects.append(Apply(transitions.interrupted(record, why, now.wall)))
        return effects + self.end()

    def end(self) -> list[Effect]:
        """Nothing is left of the run but what is still being written."""
        run, self.run = self.run, None
        if run is None:
            return []
        effects = self.drop_restore(run)
        if run.slot is not None:
            inside = [w for w in self.writing.values() if w.path == run.slot.path]
            for writing in inside:
                writing.orphaned = True
            effects += [] if inside else [TakeBack(run.slot.path)]
        return [*effects, *([] if self.writing else [RemoveStale()])]

    def drop_restore(self, run: Run) -> list[Effect]:
        ref, run.restore = run.restore, None
        return [TakeBack(ref.path)] if ref is not None else []

    def want_slot(self, run: Run, nbytes: int) -> list[Effect]:
        """The scheduler has no slot for snapshots: name ours, or make one."""
        if run.slot is not None:
            return [Send(internal.SnapshotSlot(job=run.job, attempt=run.attempt, slot=run.slot))]
        if run.making_slot or (run.stop is not None and not run.stop.snapshot):
            return []
        run.making_slot = True
        return [MakeSlot(run.job, run.attempt, nbytes)]

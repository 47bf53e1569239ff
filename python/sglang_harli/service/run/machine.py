"""The one run in progress as a machine without IO: inputs and the time in, effects out.

The scheduler is right about work applied, the store about what is wanted.  Inputs are the
scheduler's messages, what became of earlier effects, and time; ``run_driver`` carries the effects
out.  What is known here dies with the process; the jobs' records outlive it.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from sglang_harli.protocol import internal
from sglang_harli.protocol.internal import BatchCursor, SlotRef
from sglang_harli.service.jobs import evaluations, transitions
from sglang_harli.service.jobs.transitions import DesiredState, JobRecord, Transition
from sglang_harli.service.run import holds
from sglang_harli.service.run import progress as message_part
from sglang_harli.service.run import resync as hello_part
from sglang_harli.service.run.holds import NotNow
from sglang_harli.service.run.state import (
    SAY_AGAIN_S,
    SILENT_S,
    Apply,
    AskHello,
    Effect,
    JobLookup,
    Now,
    Phase,
    Preparation,
    Prepare,
    Publish,
    Run,
    Send,
    State,
    TakeBack,
    Unwritten,
)

STEPS_AHEAD = 2  # optimizer steps fed beyond the last one applied
MAX_UNSTORED = 512  # steps whose metrics are not stored: beyond it (a full disk) training waits


class RunMachine:
    """The run in progress as a function of messages, finished work and time.  ``book``: the jobs'
    records; a change is in them as soon as its ``Apply`` is carried out."""

    def __init__(self, book: JobLookup) -> None:
        self.state = State(book)

    @property
    def run(self) -> Run | None:
        return self.state.run

    @property
    def active(self) -> bool:
        """Whether a run or a checkpoint is under way."""
        return self.state.run is not None or bool(self.state.writing)

    @property
    def waits(self) -> bool:
        """Whether time alone may bring something to do."""
        state = self.state
        timed = any(hold.until_s < math.inf for hold in state.holds.values())
        return state.run is not None or bool(state.hold) or timed

    # ------------------------------------------------------------ what is wanted, and time
    def advance(self, now: Now) -> list[Effect]:
        """What the store wants next: start a job, or tell the run of a pause or cancel."""
        state = self.state
        run = state.run
        lifted = holds.lift_unqueued(state)
        if lifted:
            return lifted  # and is asked again
        if run is None:
            # A snapshot still being written may bring the very job further: it is waited for.
            ready = state.greeted and state.limits is not None and not state.writing and not state.hold
            record = state.book.next_queued() if ready else None
            return self._begin(record, now) if record is not None else []
        if run.phase in (Phase.PREPARING, Phase.STOPPING):
            return []
        record = state.running(run)
        if record is None:
            return state.unwanted(run, now)
        if record.desired not in (DesiredState.RUN, run.asked):
            run.asked = record.desired
            return state.stop(run, now, snapshot=record.desired == DesiredState.PAUSE)
        return []

    def tick(self, now: Now) -> list[Effect]:
        """Time has passed: send again what has no answer, and end pauses that are over."""
        run = self.state.run
        effects = holds.lift_due(self.state, now) + holds.still_held(self.state, now)
        if run is None or run.phase is Phase.PREPARING:
            return effects
        waiting = run.phase in (Phase.STARTING, Phase.STOPPING) or run.asked != DesiredState.RUN
        if waiting and now.s - run.sent_at_s >= SAY_AGAIN_S:
            effects += hello_part.again(run, now)
        if now.s - run.heard_at_s >= SILENT_S:
            run.heard_at_s = now.s
            effects.append(AskHello())
        return effects

    def _begin(self, record: JobRecord, now: Now) -> list[Effect]:
        state = self.state
        change = transitions.start(record, now.wall)
        run = Run(record.id, change.record.attempt, Phase.PREPARING, state.scheduler_pid)
        state.run = run
        assert state.limits is not None
        # The attempt's number is durable before the scheduler hears of it.
        return [Apply(change, then=(Prepare(run.job, run.attempt, state.limits, restore=True),))]

    # ------------------------------------------------------------ the scheduler
    def hello(self, message: internal.Hello, now: Now) -> list[Effect]:
        return hello_part.hello(self.state, message, now)

    def message(self, message: Any, now: Now) -> list[Effect]:
        """Any message about a run."""
        return message_part.take(self.state, message, now)

    # ------------------------------------------------------------ what became of effects
    def acknowledged(self, seq: int) -> None:
        self.state.unstored.discard(seq)

    def snapshot_written(
        self, message: internal.SnapshotReady, found: Unwritten | None, now: Now
    ) -> list[Effect]:
        return message_part.snapshot_written(self.state, message, found, now)

    def snapshot_delayed(self, message: internal.SnapshotReady, why: str) -> list[Effect]:
        return message_part.snapshot_delayed(self.state, message, why)

    def prepared(self, job: str, attempt: int, found: Preparation, now: Now) -> list[Effect]:
        run = self._preparing(job, attempt)
        record = self.state.running(run) if run is not None else None
        if run is None or record is None:
            drop: list[Effect] = [TakeBack(found.restore.path)] if found.restore else []
            return [*drop, *(self.state.end() if run is not None else [])]
        run.restore, run.heard_at_s = found.restore, now.s
        if found.trained:  # all that is left is the publication
            return [Apply(transitions.trained(record), then=(Publish(job),)), *self.state.end()]
        assert found.plan is not None
        run.take_plan(found.plan)
        if run.adopting:
            cursor = run.next_cursor
            at = hello_part.at(run, cursor) if cursor else found.plan.cursor_after(run.applied)
            run.go_on(at)
            run.phase = Phase.TRAINING
            return []
        change = Transition(record)
        if found.damage:
            change = transitions.fell_back(record, found.step, found.tokens, found.damage)
        if found.data is not None:
            data, total_steps = found.data, found.total_steps
            change = transitions.then(change, lambda r: transitions.tokenized_again(r, data, total_steps))
        if record.desired != DesiredState.RUN:  # paused or cancelled while it was prepared
            change = transitions.then(change, lambda r: transitions.stopped(r, now.wall))
            return [Apply(change), *self.state.end()]
        if why := holds.why_not_now(self.state, record):  # said while it was prepared
            change = transitions.then(change, lambda r: transitions.interrupted(r, why, now.wall))
            return [Apply(change), *self.state.end()]
        return self._start(run, change, found, now)

    def _start(self, run: Run, change: Transition, found: Preparation, now: Now) -> list[Effect]:
        assert found.plan is not None
        record = evaluations.go_back(change.record, found.step, internal.state_in(found.meta))
        change = Transition(record, change.drafts)
        state = msgspec.to_builtins(record.evaluation_state)
        begin = found.plan.evaluation_of(found.step)
        if begin is None or record.evaluation_state.step >= found.step:
            begin = found.plan.cursor_after(found.step)
        spec = internal.RunSpec(
            job=run.job,
            attempt=run.attempt,
            hyperparameters=record.hyperparameters,
            total_steps=record.total_steps,
            memory_bytes=self._memory_bytes(record),
        )
        run.phase, run.scheduler_pid, run.sent_at_s = Phase.STARTING, self.state.scheduler_pid, now.s
        run.start = internal.StartRun(
            spec=spec,
            scheduler=run.scheduler_pid,
            updates=self.state.updates,
            step=found.step,
            restore=found.restore,
            meta=found.meta | ({internal.EVALUATION: state} if record.evaluates else {}),
            begin=begin,
        )
        run.next_cursor = begin
        run.has_applied(found.step)
        start = Send(run.start)
        # A step back in the store comes first: its steps' metrics would be taken for known ones.
        return [start] if change.record is self.state.book.find(run.job) else [Apply(change, then=(start,))]

    def _memory_bytes(self, record: JobRecord) -> int:
        limits = self.state.limits
        longest, rows = record.data.get("longest_row", 0), record.data.get("rows", 0)
        if limits is None or not longest:
            return 0
        evaluated = record.data.get("validation") or {}
        return limits.job_memory_bytes(record.hyperparameters, longest, rows, evaluated.get("longest_row", 0))

    def cannot_start(self, job: str, attempt: int, text: str, now: Now) -> list[Effect]:
        """The StartRun cannot be sent, now or later."""
        run = self.state.run
        if run is None or (run.job, run.attempt) != (job, attempt):
            return []
        return self._failed(run, "internal", text, now) + self.state.end()

    def not_prepared(
        self, job: str, attempt: int, code: str, text: str, now: Now, param: str | None = None
    ) -> list[Effect]:
        run = self._preparing(job, attempt)
        if run is None:
            return []
        effects = self._failed(run, code, text, now, param)
        return effects + (self.state.unwanted(run, now) if run.adopting else self.state.end())

    def put_off(self, job: str, attempt: int, why: NotNow, now: Now) -> list[Effect]:
        """The run cannot be prepared, has no slot or no data now: its job waits in the queue."""
        run = self.state.run
        if run is None or (run.job, run.attempt) != (job, attempt):
            return []
        run.making_slot = False
        return holds.put_off(self.state, run, why, now)

    def slot_made(self, job: str, attempt: int, ref: SlotRef) -> list[Effect]:
        run = self.state.run
        if run is None or (run.job, run.attempt) != (job, attempt):
            return [TakeBack(ref.path)]
        run.making_slot, run.slot = False, ref
        return self.state.want_slot(run, ref.nbytes)

    def slot_refused(self, job: str, attempt: int, text: str, now: Now) -> list[Effect]:
        run = self.state.run
        if run is None or (run.job, run.attempt) != (job, attempt):
            return []
        run.making_slot = False
        return self._failed(run, "shared_memory", text, now) + self.state.unwanted(run, now)

    def _preparing(self, job: str, attempt: int) -> Run | None:
        run = self.state.run
        if run is None or (run.job, run.attempt) != (job, attempt) or run.phase is not Phase.PREPARING:
            return None
        return run

    def _failed(self, run: Run, code: str, text: str, now: Now, param: str | None = None) -> list[Effect]:
        record = self.state.book.find(run.job)
        if record is None or record.status.final or record.attempt != run.attempt:
            return []
        return [Apply(transitions.fail(record, code, text, now.wall, param))]

    # ------------------------------------------------------------ feeding
    def next_batch(self) -> BatchCursor | None:
        """The micro-batch to send now: within STEPS_AHEAD of the last step applied."""
        run = self.state.run
        if run is None or run.phase is not Phase.TRAINING or run.asked != DesiredState.RUN:
            return None
        record, cursor, plan = self.state.running(run), run.next_cursor, run.plan
        if record is None or record.desired != DesiredState.RUN or cursor is None or plan is None:
            return None
        if cursor.step > min(run.applied + STEPS_AHEAD, plan.total_steps) or run.enough_ahead:
            return None
        return None if len(self.state.unstored) >= MAX_UNSTORED else cursor

    def fed(self, cursor: BatchCursor, nbytes: int) -> None:
        """It was handed to the socket; ``nbytes``: of its arrays."""
        run = self.state.run
        if run is not None and run.plan is not None and run.next_cursor == cursor:
            run.fed(nbytes)

    def data_failed(self, cursor: BatchCursor, error: str, now: Now) -> list[Effect]:
        """The data of a micro-batch cannot be read."""
        run = self.state.run
        if run is None:
            return []
        text = f"the job's data cannot be read at step {cursor.step}: {error}: submit it again"
        return self._failed(run, "bad_data_files", text, now) + self.state.unwanted(run, now)

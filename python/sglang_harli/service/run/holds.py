"""The run machine's part for jobs that cannot run now, through no fault of their own (pure).

Such a job goes back to the queue and is *held*: passed over, with a reason that is shown.  Trouble
of the environment (a full disk, no file descriptor left) ends by itself: the job is tried again
after a growing pause.  What only another server can change is held until the scheduler is another
process, or has other limits or weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.protocol.base_print import difference
from sglang_harli.protocol.trouble import pause_s
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.served_base import other_base
from sglang_harli.service.jobs.transitions import JobRecord, Transition
from sglang_harli.service.run.state import (
    SILENT_S,
    Apply,
    AskHello,
    Effect,
    Hold,
    HoldJob,
    Now,
    Phase,
    Run,
    ServeBase,
    State,
)

MEMORY_TRIES = 3  # of a step that runs out of memory


@dataclass(frozen=True, slots=True)
class NotNow:
    """Why a run does not go on, where that is no verdict on its job."""

    reason: str
    passing: bool = True  # it ends by itself; else another server has to come


def put_off(state: State, run: Run, why: NotNow, now: Now) -> list[Effect]:
    """End the run; its job waits in the queue.  The last step is saved first if a slot is there."""
    record = state.running(run)
    effects: list[Effect] = []
    if record is not None:
        change, held = put_back(state, record, why, now)
        effects = [*held, Apply(change)]
    if run.phase is Phase.PREPARING and not run.adopting:
        return effects + state.end()
    slot_there = record is not None and (run.adopting or run.slot is not None)
    return effects + state.unwanted(run, now, snapshot=slot_there)


def put_back(state: State, record: JobRecord, why: NotNow, now: Now) -> tuple[Transition, list[Effect]]:
    """A running job's change back to the queue, and its hold there unless it was to stop."""
    change = Transition(record)
    if record.status == JobStatus.RUNNING:
        change = transitions.interrupted(record, why.reason, now.wall)
    held = change.record.status == JobStatus.QUEUED
    return change, [_hold(state, record.id, why, now)] if held else []


def may_be_tried_again(state: State, failed: internal.RunFailed) -> bool:
    """Whether a failed run is no verdict on its job.  Memory that is lacking again and again at the
    same step is one: the job is too large."""
    if not failed.passing:
        return False
    if failed.code != "out_of_memory":
        return True
    step, times = state.lacking.get(failed.job, (-1, 0))
    times = times + 1 if step == failed.step else 1
    state.lacking[failed.job] = failed.step, times
    return times < MEMORY_TRIES


def _hold(state: State, job: str, why: NotNow, now: Now) -> HoldJob:
    until_s, reason = math.inf, why.reason
    if why.passing:
        state.troubles[job] = count = state.troubles.get(job, 0) + 1
        pause = pause_s(count)
        until_s, reason = now.s + pause, f"{reason}; tried again after {pause:g} s"
    state.holds[job] = Hold(reason, until_s)
    return HoldJob(job, reason, lasting=not why.passing)


def lift_due(state: State, now: Now) -> list[Effect]:
    """Jobs whose pause is over may start."""
    return _lift(state, [job for job, hold in state.holds.items() if hold.until_s <= now.s])


def lift_unqueued(state: State) -> list[Effect]:
    """A job that is paused or over waits for nothing: resumed, it is tried at once."""
    records = {job: state.book.find(job) for job in state.holds}
    waiting = (JobStatus.QUEUED, JobStatus.RUNNING)
    return _lift(
        state, [job for job, record in records.items() if not record or record.status not in waiting]
    )


def lift_all(state: State) -> list[Effect]:
    """The server is another: whatever kept jobs back may be gone."""
    return _lift(state, list(state.holds))


def _lift(state: State, held: list[str]) -> list[Effect]:
    for job in held:
        del state.holds[job]
    return [HoldJob(job, "") for job in held]


def still_held(state: State, now: Now) -> list[Effect]:
    """Ask for a hello now and then: the one that lifts the scheduler's hold may be lost."""
    if not state.hold or state.run is not None or now.s - state.asked_at_s < SILENT_S:
        return []
    state.asked_at_s = now.s
    return [AskHello()]


def why_not_now(state: State, record: JobRecord) -> str:
    """Why a run of the job must not start, "": it may."""
    return state.hold or other_base(record.base, state.base)


def serve(state: State, message: internal.Hello) -> list[Effect]:
    """Take over the base of a hello; jobs that have none get it.  No base in a hello after an
    update: what is served is not known, and is no job's base."""
    base = message.base
    state.updates = message.updates
    if base is None:
        unknown = message.updates > 0
        if not unknown or state.base_unknown:
            return []
        state.base, state.base_unknown = None, True
        return [ServeBase(None)]
    state.base_unknown = False
    effects: list[Effect] = []
    if state.base is None or difference(state.base, base):
        effects.append(ServeBase(base))
        effects += lift_all(state)
    state.base = base
    return effects + [Apply(transitions.take_base(r, base), urgent=False) for r in state.book.without_base()]

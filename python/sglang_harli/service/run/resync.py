"""The run machine's part for hello and pulse: which run is held, and what was lost (pure)."""

from __future__ import annotations

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.service.jobs import transitions
from sglang_harli.service.run.holds import lift_all, serve
from sglang_harli.service.run.state import Apply, Effect, Now, Phase, Prepare, RemoveStale, Run, Send, State

PULSE_GRACE_S = 1.5  # what was sent later than this a pulse may not know yet


def hello(state: State, message: internal.Hello, now: Now) -> list[Effect]:
    """Compare the scheduler's run with ours: adopt it, stop it, or start ours again.  A hello older
    than the last, of this scheduler or one before, is out of date."""
    if message.seq < state.hello_seq:
        return []
    state.hello_seq = message.seq
    first, state.greeted = not state.greeted, True
    restarted = state.scheduler_pid != message.pid
    another = restarted or state.limits != message.limits
    state.limits, state.hold, state.scheduler_pid = message.limits, message.hold, message.pid
    run = state.run
    effects = serve(state, message) + (lift_all(state) if another else [])
    if message.job is None:
        effects += _none_held(state, run, now, restarted=restarted) if run is not None else []
    elif run is None:
        effects += _meet(state, message, now)
    elif state.named(message) is None:
        effects.append(_stop(message))
    else:
        run.heard_at_s = now.s
        run.has_applied(message.step)
    if first and state.run is None and not state.writing:
        effects.append(RemoveStale())
    return effects


def _none_held(state: State, run: Run, now: Now, *, restarted: bool) -> list[Effect]:
    if run.phase is Phase.PREPARING and not run.adopting:
        return []
    if run.phase is Phase.STARTING and run.scheduler_pid == state.scheduler_pid:
        updated = run.start is not None and run.start.updates != state.updates
        if state.hold or updated:  # its StartRun was dropped, or will be
            return state.lost(run, state.hold or "the served weights were updated", now)
        return again(run, now)  # the StartRun may have been lost; it is no harm to say it twice
    why = "the scheduler was restarted" if restarted else "the scheduler has lost the run"
    return state.lost(run, why, now)


def again(run: Run, now: Now) -> list[Effect]:
    """Say once more what has no answer yet."""
    last = run.stop or run.start
    if last is None:
        return []
    run.sent_at_s = now.s
    return [Send(last)]


def pulse(state: State, message: internal.Pulse, now: Now) -> list[Effect]:
    """Find what was lost on the way to the scheduler, or from it, and say it again."""
    if not state.greeted:
        return []
    run = state.run
    if run is None:
        return _meet(state, message, now)
    if state.named(message) is None:
        return [_stop(message)]
    run.heard_at_s = now.s
    run.has_applied(message.step)
    if message.taken is not None:
        run.has_taken(message.taken.step, message.taken.index)
    if run.phase is Phase.PREPARING:
        return []
    effects: list[Effect] = []
    if message.state_bytes:
        if run.phase is Phase.STARTING:  # its RunStarted was lost, or is late
            run.phase = Phase.TRAINING
            effects += state.drop_restore(run)
        if not message.has_slot:
            effects += state.want_slot(run, message.state_bytes)
    if run.stop is not None and not message.stopping and now.s - run.sent_at_s >= PULSE_GRACE_S:
        effects += again(run, now)
    return effects + _answer_snapshot(state, message) + _rewind(run, message)


def _answer_snapshot(state: State, message: internal.Pulse) -> list[Effect]:
    """The SnapshotSaved that the scheduler waits for was lost or never sent."""
    key = (message.job, message.attempt, message.snapshot)
    if message.snapshot < 0 or key in state.writing:
        return []
    record = state.book.find(message.job)
    if record is not None and record.checkpoint_step >= message.snapshot:
        return [Send(saved(message, message.snapshot, ok=True))]
    return [Send(saved(message, message.snapshot, ok=False))] if state.given_up == key else []


def _rewind(run: Run, message: internal.Pulse) -> list[Effect]:
    """Two pulses in a row behind our cursor at the same place: its micro-batch was lost."""
    theirs, ours = message.next_cursor, run.next_cursor
    place = (theirs.step, theirs.index)
    behind = ours is not None and place < (ours.step, ours.index)
    if behind and run.seen_behind == place and run.plan is not None:
        run.go_back(at(run, theirs))
        run.seen_behind = None
    else:
        run.seen_behind = place if behind else None
    return []


def at(run: Run, cursor: internal.BatchCursor) -> internal.BatchCursor:
    """The cursor with its step's epoch (the scheduler only knows that of the last one fed)."""
    assert run.plan is not None
    epoch = run.plan.cursor_after(cursor.step - 1).epoch
    return internal.BatchCursor(epoch=epoch, step=cursor.step, index=cursor.index)


def saved(message: internal.Pulse | internal.SnapshotReady, step: int, *, ok: bool) -> internal.SnapshotSaved:
    return internal.SnapshotSaved(job=message.job, attempt=message.attempt, step=step, ok=ok)


def _stop(message: internal.Hello | internal.Pulse) -> Effect:
    assert message.job is not None
    return Send(internal.StopRun(job=message.job, attempt=message.attempt, snapshot=False))


def _meet(state: State, message: internal.Hello | internal.Pulse, now: Now) -> list[Effect]:
    """The scheduler holds a run that this process did not start, or has finished."""
    assert message.job is not None
    record = state.book.find(message.job)
    if record is not None and record.attempt != message.attempt:
        record = None  # an older attempt: nothing of it is wanted
    if record is not None and record.complete:
        # All is trained and durable: the writer died before it sent this, or it was lost.
        done = internal.SnapshotSaved(job=record.id, attempt=record.attempt, step=record.last_step)
        return [Send(done)]
    run = Run(message.job, message.attempt, Phase.PREPARING, state.scheduler_pid)
    run.has_applied(message.step)
    if message.taken is not None:
        run.has_taken(message.taken.step, message.taken.index)
    run.heard_at_s = now.s
    state.run = run
    if record is None or record.status != JobStatus.QUEUED or state.limits is None:
        keep = record is not None and record.status in (JobStatus.QUEUED, JobStatus.PAUSED)
        return state.unwanted(run, now, snapshot=keep)
    run.adopting, run.next_cursor = True, message.next_cursor
    prepare = Prepare(run.job, run.attempt, state.limits, restore=False)
    return [Apply(transitions.adopt(record, message.step), then=(prepare,))]

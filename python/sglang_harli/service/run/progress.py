"""The run machine's part for a run's messages: what each changes, when it is acknowledged (pure).

A kept message is acknowledged once what it says is durable or of no use any more; one that came too
early is dropped without an Ack, and comes again.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_harli.core import JobStatus, SubState
from sglang_harli.protocol import internal
from sglang_harli.service.jobs import evaluations, transitions
from sglang_harli.service.jobs.transitions import DesiredState, JobRecord, Transition
from sglang_harli.service.run.holds import NotNow, may_be_tried_again, put_back
from sglang_harli.service.run.resync import pulse, saved
from sglang_harli.service.run.state import (
    IN_PASSING,
    Acknowledge,
    Apply,
    Effect,
    Now,
    Phase,
    Publish,
    RemoveStale,
    Run,
    Saved,
    SaveSnapshot,
    Send,
    State,
    TakeBack,
    Unwritten,
    Writing,
)

logger = logging.getLogger(__name__)

SUB_STATE_EVENT_S = 10.0  # a sub-state that changes faster is shown in the job, and is no event
METRICS = (
    *("step", "epoch", "loss", "train_mean_token_accuracy", "learning_rate", "grad_norm"),
    *("tokens", "target_tokens", "seconds", "attempt"),
)


def take(state: State, message: Any, now: Now) -> list[Effect]:
    """Any message of the scheduler about a run."""
    if isinstance(message, internal.Pulse):
        return pulse(state, message, now)
    run = state.named(message)
    if run is not None:
        run.heard_at_s = now.s
    if isinstance(message, internal.BatchesTaken):
        if run is not None:
            run.has_taken(message.cursor.step, message.cursor.index)
        return []
    record = state.book.find(message.job)
    if isinstance(message, internal.Progress):
        return _progress(state, run, message, now)
    if record is None or record.attempt != message.attempt:
        over = isinstance(message, internal.RunStopped | internal.RunFailed) and run is not None
        return [Acknowledge(message.seq), *(state.end() if over else [])]
    if isinstance(message, internal.RunStarted):
        return _started(state, run, message)
    if _too_early(record, message):
        return []
    if isinstance(message, internal.EvaluationDone):
        return _evaluated(state, run, record, message)
    if isinstance(message, internal.StepDone):
        return _step_done(state, run, record, message)
    if isinstance(message, internal.SnapshotReady):
        return _snapshot(state, record, message, now)
    return _over(state, run, record, message, now)


def _too_early(record: JobRecord, message: Any) -> bool:
    """Whether a step or an evaluation before it is missing; sent again, that comes first."""
    if record.status.final or record.metrics_attempt != message.attempt:
        return False
    lacks = not isinstance(message, internal.EvaluationDone) and (
        record.evaluation_state.step < message.evaluated
    )
    return lacks or record.metrics_step < message.after


def _started(state: State, run: Run | None, message: internal.RunStarted) -> list[Effect]:
    if run is None or run.phase is Phase.PREPARING:
        return [Acknowledge(message.seq)]  # it is over, or not adopted yet: then a pulse says the same
    effects = state.drop_restore(run)
    if run.phase is Phase.STARTING:
        run.phase = Phase.TRAINING
    return [*effects, *state.want_slot(run, message.state_bytes), Acknowledge(message.seq)]


def _step_done(state: State, run: Run | None, record: JobRecord, message: internal.StepDone) -> list[Effect]:
    if run is not None:
        run.has_applied(message.step)
        state.troubles.pop(run.job, None)  # the next one counts as the first
    known = (message.attempt, message.step) <= (record.metrics_attempt, record.metrics_step)
    if record.status.final or (known and message.seq not in state.unstored):
        return [Acknowledge(message.seq)]
    if known:
        return []  # said again while it is being stored
    metrics = {name: getattr(message, name) for name in METRICS}
    if record.status == JobStatus.RUNNING:
        change = transitions.step_done(record, message.step, message.total_tokens, metrics)
    else:
        change = transitions.late_step(record, message.step, metrics)
    state.unstored.add(message.seq)
    return [Apply(change, urgent=False, then=(Acknowledge(message.seq),))]


def _evaluated(
    state: State, run: Run | None, record: JobRecord, message: internal.EvaluationDone
) -> list[Effect]:
    if run is not None:
        run.has_evaluated(message.step)
    known = message.step <= record.evaluation_state.step
    if record.status.final or (known and message.seq not in state.unstored):
        return [Acknowledge(message.seq)]
    if known:
        return []  # said again while it is being stored
    state.unstored.add(message.seq)
    change = evaluations.evaluated(record, message)
    return [Apply(change, urgent=False, then=(Acknowledge(message.seq),))]


def _progress(state: State, run: Run | None, message: internal.Progress, now: Now) -> list[Effect]:
    record = state.running(run) if run is not None else None
    if run is None or record is None:
        return []
    run.has_applied(message.step)
    try:
        sub_state = SubState(message.sub_state)
    except ValueError:
        logger.error("the scheduler reports an unknown sub-state %r", message.sub_state)
        return []
    reason = message.reason if record.desired == DesiredState.RUN else record.reason
    reason = next((w.delayed for key, w in state.writing.items() if w.delayed and key[0] == run.job), reason)
    change = transitions.progress(record, message.step, message.tokens, sub_state, reason)
    if run.told_sub_state != sub_state and now.s - run.told_at_s >= SUB_STATE_EVENT_S:
        run.told_sub_state, run.told_at_s = sub_state, now.s
        change = transitions.sub_state_event(change.record)
    return [Apply(change, urgent=False)]


def _over(state: State, run: Run | None, record: JobRecord, message: Any, now: Now) -> list[Effect]:
    """RunStopped or RunFailed."""
    done = Acknowledge(message.seq)
    effects = state.end() if run is not None else []
    running = record.status == JobStatus.RUNNING and not record.publishing
    failed = isinstance(message, internal.RunFailed) and (running or record.status == JobStatus.QUEUED)
    if failed and may_be_tried_again(state, message):
        change, held = put_back(state, record, NotNow(message.message), now)
        return [*held, Apply(change, then=(done,)), *effects]
    if failed:
        change = transitions.fail(record, message.code, message.message, now.wall)
    elif running:
        why = message.reason if isinstance(message, internal.RunStopped) else ""
        change = (
            transitions.interrupted(record, why, now.wall) if why else transitions.stopped(record, now.wall)
        )
    else:
        return [done, *effects]
    return [Apply(change, then=(done,)), *effects]


# ------------------------------------------------------------------ snapshots
def _snapshot(state: State, record: JobRecord, message: internal.SnapshotReady, now: Now) -> list[Effect]:
    if message.reason == "shutdown":  # the server ends: nothing is started before another hello
        state.greeted = False
    key = (message.job, message.attempt, message.step)
    if key in state.writing:  # announced twice: written once
        state.writing[key].seqs.add(message.seq)
        return []
    if record.checkpoint_step >= message.step:
        # Announced again after a restart of this service; or saved before its evaluation was over.
        known: list[Effect] = [Send(saved(message, message.step, ok=True)), Acknowledge(message.seq)]
        if not record.complete or record.publishing or record.status.final:
            return known
        change, after = _ended(state, Transition(record), message, now)
        return [Apply(change, then=(*known, *after))]
    if record.status.final:
        return [Acknowledge(message.seq)]
    if state.given_up == key and message.reason in IN_PASSING:
        # The slot may hold another step by now: it is not read again.
        return [Send(saved(message, message.step, ok=False)), Acknowledge(message.seq)]
    state.writing[key] = Writing(message.slot.path, {message.seq})
    return [SaveSnapshot(message)]


def snapshot_delayed(state: State, message: internal.SnapshotReady, why: str) -> list[Effect]:
    """A snapshot cannot be written yet: its run, if it stops or ends, waits for that."""
    writing = state.writing.get((message.job, message.attempt, message.step))
    run = state.named(message)
    record = state.running(run) if run is not None else None
    if writing is None or record is None or message.reason in IN_PASSING:
        return []
    writing.delayed = why
    change = transitions.progress(record, message.step, record.trained_tokens, SubState.CHECKPOINTING, why)
    return [Apply(change, urgent=False)]


def snapshot_written(
    state: State, message: internal.SnapshotReady, found: Unwritten | None, now: Now
) -> list[Effect]:
    """A snapshot is on disk (None), or was given up."""
    key = (message.job, message.attempt, message.step)
    writing = state.writing.pop(key)
    acks = tuple(Acknowledge(seq) for seq in sorted(writing.seqs))
    record = state.book.find(message.job)
    if record is None or record.attempt != message.attempt or record.status.final or record.publishing:
        return [*acks, *_freed(state, writing)]
    if found is not None:
        state.given_up = key
        return _given_up(state, record, message, found, acks, now) + _freed(state, writing)
    change, after = _checkpointed(state, record, message, now)
    after = [Saved(record.id), Send(saved(message, message.step, ok=True)), *acks, *after]
    # A service killed before the commit hears of the snapshot again, and reads the slot again.
    return [Apply(change, then=(*after, *_freed(state, writing)))]


def _freed(state: State, writing: Writing) -> list[Effect]:
    """What of shared memory may go now that a snapshot is settled."""
    effects: list[Effect] = [TakeBack(writing.path)] if writing.orphaned else []
    if state.greeted and state.run is None and not state.writing:
        effects.append(RemoveStale())
    return effects


def _checkpointed(
    state: State, record: JobRecord, message: internal.SnapshotReady, now: Now
) -> tuple[Transition, list[Effect]]:
    """The transition, and what follows once it is durable."""
    counted = message.meta.get("tokens")
    tokens = counted if isinstance(counted, int) else record.trained_tokens
    trained = {name: getattr(message, name) for name in ("train_loss", "train_mean_token_accuracy")}
    change = transitions.checkpoint_saved(record, message.step, tokens, message.reason, trained)
    return _ended(state, change, message, now)


def _ended(
    state: State, change: Transition, message: internal.SnapshotReady, now: Now
) -> tuple[Transition, list[Effect]]:
    """A change with the end of the training, where nothing of it is left; and what follows."""
    record, after = change.record, []
    if record.complete and record.status == JobStatus.RUNNING:
        if record.desired == DesiredState.CANCEL:
            change = transitions.then(change, lambda r: transitions.stopped(r, now.wall))
        else:  # one commit: both or none
            change = transitions.then(change, lambda r: Transition(transitions.trained(r).record))
            after.append(Publish(record.id))
        if state.named(message) is not None:
            after += state.end()
    return change, after


def _given_up(
    state: State,
    record: JobRecord,
    message: internal.SnapshotReady,
    found: Unwritten,
    acks: tuple[Acknowledge, ...],
    now: Now,
) -> list[Effect]:
    run = state.named(message)
    if run is None or message.reason in (*IN_PASSING, "shutdown"):
        return [Send(saved(message, message.step, ok=False)), *acks]
    # The state is lost: it is trained again from the checkpoint before.
    change, held = put_back(state, record, NotNow(found.why), now)
    if found.lasting and record.status == JobStatus.RUNNING:
        text = f"{found.why}: submit it again"
        change, held = transitions.fail(record, "checkpoint_failed", text, now.wall), []
    return [*held, Apply(change, then=acks), *state.unwanted(run, now)]

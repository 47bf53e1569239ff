r"""The state machine of a job: pure functions from a record to the next record and its events.

::

    queued --start--> running --trained--> running (publishing) --published--> succeeded
      ^  \              |  |
      |   `-pause-.     |  `--fail--> failed          cancel: from queued, paused and running
      |           v     |
      `--resume-- paused<-' (stopped, where pause was wished)

What is *wanted* of a running job is its ``wish``; what *is* stays as it is until the scheduler says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from sglang_harli.core import JobStatus, SubState
from sglang_harli.errors import StateError
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.public import JobError
from sglang_harli.service.jobs.record import Change as Change
from sglang_harli.service.jobs.record import Draft as Draft
from sglang_harli.service.jobs.record import JobRecord as JobRecord
from sglang_harli.service.jobs.record import Wish as Wish
from sglang_harli.service.jobs.record import public as public


def then(change: Change, *steps: Callable[[JobRecord], Change]) -> Change:
    """Several transitions as one: all of their events, and the record after the last."""
    for step in steps:
        following = step(change.record)
        change = Change(following.record, change.drafts + following.drafts)
    return change


def _change(record: JobRecord, *drafts: Draft, **values: Any) -> Change:
    return Change(msgspec.structs.replace(record, **values), drafts)


# ------------------------------------------------------------------ creation and the run
def created(record: JobRecord, summary: str) -> Change:
    """The events of a job that was just accepted."""
    data: dict[str, Any] = {"total_steps": record.total_steps}
    text = f"job {record.id} created"
    if record.resumed_from is not None:
        data |= {"resumed_from": record.resumed_from, "step": record.checkpoint_step}
        what = (
            "with the adapter"
            if record.carried and not record.checkpoint_step
            else f"from step {record.checkpoint_step}"
        )
        text += f": goes on {what} of job {record.resumed_from}"
    return _change(
        record,
        Draft("job_created", text, data=data),
        Draft("data_validated", summary, data=dict(record.data)),
        Draft("queued", "waiting for its turn"),
    )


def start(record: JobRecord, now: float) -> Change:
    """A queued job's run is asked of the scheduler, under the next attempt number."""
    _require(record, "started", JobStatus.QUEUED)
    again = record.attempt > 0
    at = f" from the checkpoint of step {record.checkpoint_step}" if record.checkpoint_step else ""
    return _change(
        record,
        Draft("resumed" if again else "started", f"attempt {record.attempt + 1} starts{at}"),
        status=JobStatus.RUNNING,
        attempt=record.attempt + 1,
        started_at=record.started_at or now,
        sub_state=SubState.WAITING_DATA,
        reason="the run is being prepared",
        step=record.checkpoint_step,
        trained_tokens=record.checkpoint_tokens,
        metrics_attempt=record.attempt + 1,
        metrics_step=record.checkpoint_step,
        wish=Wish.RUN,
    )


def take_base(record: JobRecord, base: BasePrint) -> Change:
    """A job whose base nobody has noted takes the one that is served."""
    return _change(record, base=base)


def tokenized_again(record: JobRecord, data: dict[str, Any], total_steps: int) -> Change:
    """Its rows were made again: the server has another tokenizer, chat template or limit than at its submission."""
    text = (
        "the rows were made again with this server's tokenizer, chat template and limit: "
        f"{data['rows']} rows, {data['tokens']} tokens, {total_steps} steps"
    )
    return _change(record, Draft("data_validated", text, data=dict(data)), data=data, total_steps=total_steps)


def fell_back(record: JobRecord, step: int, tokens: int, damage: str) -> Change:
    """Newer checkpoints than that of ``step`` cannot be read (``damage``): the work since is done again.

    ``step`` 0: there is none at all.
    """
    where = f"the checkpoint of step {step}" if step else "the beginning"
    return _change(
        record,
        Draft(
            "warning",
            f"{damage}: goes on from {where}",
            level="warn",
            data={"step": step, "lost_steps": record.checkpoint_step - step},
        ),
        checkpoint_step=step,
        checkpoint_tokens=tokens,
        step=step,
        trained_tokens=tokens,
        metrics_step=step,
    )


def train_again(record: JobRecord, why: str) -> Change:
    """The last checkpoint turned out to be damaged when it was to be published: what it held is trained again."""
    _require(record, "trained again", JobStatus.RUNNING)
    return _change(
        record,
        Draft("warning", f"{why}: the last steps are trained again", level="warn"),
        Draft("queued", "waiting for its turn"),
        status=JobStatus.QUEUED,
        publishing=False,
        sub_state=None,
        reason=None,
    )


def adopt(record: JobRecord, step: int) -> Change:
    """The scheduler still holds this job's run: go on with it instead of starting another attempt."""
    _require(record, "adopted", JobStatus.QUEUED)
    return _change(
        record,
        Draft("resumed", f"the run in progress goes on at step {step}"),
        status=JobStatus.RUNNING,
        sub_state=SubState.TRAINING,
        reason=None,
        step=max(record.step, step),
        wish=Wish.RUN,
    )


def step_done(record: JobRecord, step: int, tokens: int, metrics: dict[str, Any]) -> Change:
    """One optimizer step was applied; ``metrics`` are its plain values (loss, learning_rate, seconds...)."""
    seconds = metrics["seconds"]
    step_s = seconds if record.step_s is None else 0.8 * record.step_s + 0.2 * seconds
    rate = metrics["tokens"] / seconds if seconds > 0 else None
    if rate is not None and record.tokens_per_s is not None:
        rate = 0.8 * record.tokens_per_s + 0.2 * rate
    return _change(
        record,
        Draft("step_metrics", f"step {step}/{record.total_steps}, loss {metrics['loss']:.4f}", data=metrics),
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
        loss=metrics["loss"],
        learning_rate=metrics["learning_rate"],
        tokens_per_s=rate if rate is not None else record.tokens_per_s,
        step_s=step_s,
        metrics_attempt=record.attempt,
        metrics_step=step,
    )


def late_step(record: JobRecord, step: int, metrics: dict[str, Any]) -> Change:
    """Metrics of a step that come when the job does not run any more, or not yet again: they are history."""
    return _change(
        record,
        Draft("step_metrics", f"step {step}/{record.total_steps}, loss {metrics['loss']:.4f}", data=metrics),
        metrics_attempt=record.attempt,
        metrics_step=step,
    )


def progress(record: JobRecord, step: int, tokens: int, sub_state: SubState, reason: str | None) -> Change:
    """What the running job is doing; no event of its own (see ``sub_state_event``)."""
    return _change(
        record,
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
        sub_state=sub_state,
        reason=reason or None,
    )


def sub_state_event(record: JobRecord) -> Change:
    why = f": {record.reason}" if record.reason else ""
    return _change(
        record, Draft("sub_state", f"{record.sub_state}{why}", data={"sub_state": record.sub_state})
    )


def checkpoint_saved(record: JobRecord, step: int, tokens: int, reason: str) -> Change:
    return _change(
        record,
        Draft("checkpoint_saved", f"checkpoint of step {step} saved", data={"step": step, "reason": reason}),
        checkpoint_step=step,
        checkpoint_tokens=tokens,
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
    )


def trained(record: JobRecord) -> Change:
    """The last step's state is durable: from here on only the publication is left."""
    return _change(
        record,
        step=record.total_steps,
        publishing=True,
        sub_state=SubState.PUBLISHING,
        reason="the adapter is being made servable",
    )


def stopped(record: JobRecord, now: float) -> Change:
    """The scheduler has given the run up, as asked: paused, cancelled, or queued again."""
    if record.wish == Wish.CANCEL:
        return _cancelled(record, now)
    back = _back_to_checkpoint(record)
    if record.wish == Wish.PAUSE:
        draft = Draft("paused", f"paused at step {record.checkpoint_step}")
        return _change(record, draft, status=JobStatus.PAUSED, wish=Wish.RUN, **back)
    return _change(record, Draft("queued", "waiting for its turn"), status=JobStatus.QUEUED, **back)


def interrupted(record: JobRecord, why: str, now: float) -> Change:
    """The run is gone without having been asked to stop; the job starts again from its checkpoint."""
    if record.wish != Wish.RUN:
        return stopped(record, now)
    draft = Draft("queued", f"{why}; goes on from step {record.checkpoint_step}", level="warn")
    return _change(record, draft, status=JobStatus.QUEUED, **_back_to_checkpoint(record))


def published(record: JobRecord, now: float) -> Change:
    """The adapter answers under its name."""
    return _change(
        record,
        Draft("adapter_published", f"served as {record.adapter_name}", data={"model": record.adapter_name}),
        Draft("succeeded", f"the job is done: use model={record.adapter_name}"),
        status=JobStatus.SUCCEEDED,
        finished_at=now,
        fine_tuned_model=record.adapter_name,
        step=record.total_steps,
        publishing=False,
        wish=Wish.RUN,
        sub_state=None,
        reason=None,
    )


def fail(record: JobRecord, code: str, message: str, now: float, param: str | None = None) -> Change:
    if record.wish == Wish.CANCEL:
        return _cancelled(record, now)
    return _change(
        record,
        Draft("failed", message, level="error", data={"code": code}),
        status=JobStatus.FAILED,
        finished_at=now,
        error=JobError(code, message, param),
        publishing=False,
        wish=Wish.RUN,
        sub_state=None,
        reason=None,
    )


# ------------------------------------------------------------------ what users ask for
def ask_pause(record: JobRecord) -> Change:
    """Raises StateError where the job is over, or its training is."""
    if record.status == JobStatus.PAUSED:
        return Change(record)
    if record.status == JobStatus.QUEUED:
        return _change(record, Draft("paused", f"paused at step {record.step}"), status=JobStatus.PAUSED)
    _require(record, "paused", JobStatus.RUNNING)
    if record.publishing:
        raise StateError(
            f"job {record.id} cannot be paused: its training is done and the adapter is being published"
        )
    if record.wish == Wish.CANCEL:
        raise StateError(f"job {record.id} cannot be paused: it is being cancelled")
    return _change(record, wish=Wish.PAUSE, reason="pausing: the state is being saved")


def ask_resume(record: JobRecord) -> Change:
    if record.status == JobStatus.QUEUED:
        return Change(record)
    if record.status == JobStatus.PAUSED:
        return _change(record, Draft("queued", "waiting for its turn"), status=JobStatus.QUEUED)
    _require(record, "resumed", JobStatus.RUNNING)
    if record.wish == Wish.CANCEL:
        raise StateError(f"job {record.id} cannot be resumed: it is being cancelled")
    return _change(record, wish=Wish.RUN, reason=None) if record.wish == Wish.PAUSE else Change(record)


def ask_cancel(record: JobRecord, now: float, *, in_flight: bool) -> Change:
    """``in_flight``: the HTTP process has been asked to publish and has not answered.  Its answer decides
    then: published means succeeded, anything else cancelled."""
    if record.status == JobStatus.CANCELLED:
        return Change(record)
    if record.status in (JobStatus.QUEUED, JobStatus.PAUSED) or (record.publishing and not in_flight):
        return _cancelled(record, now)
    _require(record, "cancelled", JobStatus.RUNNING)
    return _change(record, wish=Wish.CANCEL, reason="cancelling")


def ask_priority(record: JobRecord, priority: int) -> Change:
    """Its place in the queue, now and whenever it comes back to it."""
    if record.status.final:
        raise StateError(f"job {record.id} is {record.status}: only a job that is not over has a priority")
    if priority == record.priority:
        return Change(record)
    draft = Draft("prioritized", f"priority {priority} (was {record.priority})", data={"priority": priority})
    return _change(record, draft, priority=priority)


def warn(record: JobRecord, message: str, **data: Any) -> Change:
    return _change(record, Draft("warning", message, level="warn", data=data))


def delayed(record: JobRecord, why: str) -> Change:
    """The job's publication waits; its reason says what for."""
    return _change(record, Draft("warning", why, level="warn"), reason=why)


def _cancelled(record: JobRecord, now: float) -> Change:
    return _change(
        record,
        Draft("cancelled", f"cancelled at step {record.step}"),
        status=JobStatus.CANCELLED,
        finished_at=now,
        publishing=False,
        wish=Wish.RUN,
        sub_state=None,
        reason=None,
    )


def _back_to_checkpoint(record: JobRecord) -> dict[str, Any]:
    return {
        "step": record.checkpoint_step,
        "trained_tokens": record.checkpoint_tokens,
        "sub_state": None,
        "reason": None,
    }


def _require(record: JobRecord, what: str, status: JobStatus) -> None:
    if record.status != status:
        raise StateError(f"job {record.id} is {record.status} and cannot be {what}")

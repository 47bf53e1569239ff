r"""The state machine of a job: pure functions from a record to the next record and its events.

::

    validating_files --validated--> queued          a file that is not accepted: failed
    queued --start--> running --trained--> running (publishing) --published--> succeeded
      ^  \              |  |
      |   `-pause-.     |  `--fail--> failed          cancel: from all but the ends
      |           v     |
      `--resume-- paused<-' (stopped, where pause was wished)

What the user wants of a running job is its ``desired`` state; its status changes when the scheduler
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from sglang_harli.core import JobStatus, SubState
from sglang_harli.errors import HarliError, StateError
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.public import JobError
from sglang_harli.service.jobs import evaluations
from sglang_harli.service.jobs.record import DesiredState as DesiredState
from sglang_harli.service.jobs.record import EventDraft as EventDraft
from sglang_harli.service.jobs.record import JobRecord as JobRecord
from sglang_harli.service.jobs.record import Transition as Transition
from sglang_harli.service.jobs.record import public as public

_QUEUED = EventDraft("queued", "waiting for its turn")
# In each record whose job is over.
_ENDED: dict[str, Any] = {"publishing": False, "desired": DesiredState.RUN, "sub_state": None, "reason": None}


def then(change: Transition, *steps: Callable[[JobRecord], Transition]) -> Transition:
    """Several transitions as one: all of their events, and the record after the last."""
    for step in steps:
        following = step(change.record)
        change = Transition(following.record, change.drafts + following.drafts)
    return change


def _change(record: JobRecord, *drafts: EventDraft, **values: Any) -> Transition:
    return Transition(msgspec.structs.replace(record, **values), drafts)


# ------------------------------------------------------------------ creation and the run
def created(record: JobRecord, summary: str) -> Transition:
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
        EventDraft("job_created", text, data=data),
        EventDraft("data_validated", summary, data=dict(record.data)),
        _QUEUED,
    )


def received(record: JobRecord) -> Transition:
    """The events of a job whose files are looked at later."""
    text = f"job {record.id} created"
    if record.resumed_from is not None:
        text += f": goes on with the adapter of job {record.resumed_from}"
    return _change(
        record,
        EventDraft("job_created", text, data=_origin(record)),
        EventDraft("validating", f"the training file {record.training_file} is to be looked at"),
    )


def _origin(record: JobRecord) -> dict[str, Any]:
    return {"resumed_from": record.resumed_from} if record.resumed_from is not None else {}


def validated(
    record: JobRecord, data: dict[str, Any], total_steps: int, summary: str, *, admitted: bool
) -> Transition:
    """The files are accepted: the job waits for its turn."""
    _require(record, "validated", JobStatus.VALIDATING_FILES)
    return _change(
        record,
        EventDraft("data_validated", summary, data=data),
        _QUEUED,
        status=JobStatus.QUEUED,
        data=data,
        total_steps=total_steps,
        admitted=admitted,
        validated=True,
        reason=None,
    )


def not_validated_yet(record: JobRecord, why: str) -> Transition:
    """The files cannot be looked at now: the reason is shown, and it is tried again."""
    return _change(record, reason=why)


def not_accepted(record: JobRecord, lines: list[EventDraft], error: HarliError, now: float) -> Transition:
    """The files are not accepted: the job has failed, with what is wrong in which lines."""
    param = "validation_file" if error.param == "validation" else "training_file"
    change = fail(record, error.code, error.message, now, param)
    return Transition(change.record, (*lines, *change.drafts))


def start(record: JobRecord, now: float) -> Transition:
    """A queued job's run is asked of the scheduler, under the next attempt number."""
    _require(record, "started", JobStatus.QUEUED)
    again = record.attempt > 0
    at = f" from the checkpoint of step {record.checkpoint_step}" if record.checkpoint_step else ""
    return _change(
        record,
        EventDraft("resumed" if again else "started", f"attempt {record.attempt + 1} starts{at}"),
        status=JobStatus.RUNNING,
        attempt=record.attempt + 1,
        started_at=record.started_at or now,
        sub_state=SubState.WAITING_DATA,
        reason="the run is being prepared",
        step=record.checkpoint_step,
        trained_tokens=record.checkpoint_tokens,
        metrics_attempt=record.attempt + 1,
        metrics_step=record.checkpoint_step,
        desired=DesiredState.RUN,
    )


def take_base(record: JobRecord, base: BasePrint) -> Transition:
    """A job whose base is not recorded takes the one that is served."""
    return _change(record, base=base)


def tokenized_again(record: JobRecord, data: dict[str, Any], total_steps: int) -> Transition:
    """Its rows were made again: the server's tokenizer, chat template or limit has changed."""
    text = (
        "the rows were made again with this server's tokenizer, chat template and limit: "
        f"{data['rows']} rows, {data['tokens']} tokens, {total_steps} steps"
    )
    return _change(
        record, EventDraft("data_validated", text, data=dict(data)), data=data, total_steps=total_steps
    )


def fell_back(record: JobRecord, step: int, tokens: int, damage: str) -> Transition:
    """Checkpoints after ``step`` (0: all) cannot be read: the work since is done again."""
    where = f"the checkpoint of step {step}" if step else "the beginning"
    return _change(
        record,
        EventDraft(
            "warning",
            f"{damage}: goes on from {where}",
            level="warn",
            data={"step": step, "lost_steps": record.checkpoint_step - step},
        ),
        checkpoint_step=step,
        checkpoint_tokens=tokens,
        checkpoints=[kept for kept in record.checkpoints if kept.step <= step],
        step=step,
        trained_tokens=tokens,
        metrics_step=step,
    )


def train_again(record: JobRecord, why: str) -> Transition:
    """The last checkpoint turned out damaged at its publication: what it held is trained again."""
    _require(record, "trained again", JobStatus.RUNNING)
    return _change(
        record,
        EventDraft("warning", f"{why}: the last steps are trained again", level="warn"),
        _QUEUED,
        status=JobStatus.QUEUED,
        publishing=False,
        sub_state=None,
        reason=None,
    )


def adopt(record: JobRecord, step: int) -> Transition:
    """The scheduler still holds this job's run: it goes on, without another attempt."""
    _require(record, "adopted", JobStatus.QUEUED)
    return _change(
        record,
        EventDraft("resumed", f"the run in progress goes on at step {step}"),
        status=JobStatus.RUNNING,
        sub_state=SubState.TRAINING,
        reason=None,
        step=max(record.step, step),
        desired=DesiredState.RUN,
    )


def step_done(record: JobRecord, step: int, tokens: int, metrics: dict[str, Any]) -> Transition:
    """One optimizer step was applied; ``metrics``: plain values such as loss and seconds."""
    seconds = metrics["seconds"]
    step_s = seconds if record.step_s is None else 0.8 * record.step_s + 0.2 * seconds
    rate = metrics["tokens"] / seconds if seconds > 0 else None
    if rate is not None and record.tokens_per_s is not None:
        rate = 0.8 * record.tokens_per_s + 0.2 * rate
    return _change(
        record,
        _metrics_event(record, step, metrics),
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
        loss=metrics["loss"],
        train_mean_token_accuracy=metrics.get("train_mean_token_accuracy"),
        learning_rate=metrics["learning_rate"],
        tokens_per_s=rate if rate is not None else record.tokens_per_s,
        step_s=step_s,
        metrics_attempt=record.attempt,
        metrics_step=step,
        checkpoints=evaluations.with_step(record, step, metrics),
    )


def _metrics_event(record: JobRecord, step: int, metrics: dict[str, Any]) -> EventDraft:
    text = f"step {step}/{record.total_steps}, loss {metrics['loss']:.4f}"
    return EventDraft("step_metrics", text, data=metrics)


def late_step(record: JobRecord, step: int, metrics: dict[str, Any]) -> Transition:
    """A step's metrics that come while the job does not run: they are history."""
    draft = _metrics_event(record, step, metrics)
    return _change(record, draft, metrics_attempt=record.attempt, metrics_step=step)


def progress(
    record: JobRecord, step: int, tokens: int, sub_state: SubState, reason: str | None
) -> Transition:
    """What the running job is doing; no event of its own (see ``sub_state_event``)."""
    return _change(
        record,
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
        sub_state=sub_state,
        reason=reason or None,
    )


def sub_state_event(record: JobRecord) -> Transition:
    why = f": {record.reason}" if record.reason else ""
    return _change(
        record, EventDraft("sub_state", f"{record.sub_state}{why}", data={"sub_state": record.sub_state})
    )


def checkpoint_saved(
    record: JobRecord, step: int, tokens: int, reason: str, trained: Mapping[str, Any] | None = None
) -> Transition:
    """``trained``: what is known of the step, by the names of ``CheckpointMetrics``."""
    return _change(
        record,
        EventDraft(
            "checkpoint_saved", f"checkpoint of step {step} saved", data={"step": step, "reason": reason}
        ),
        checkpoint_step=step,
        checkpoint_tokens=tokens,
        checkpoints=evaluations.with_checkpoint(record, step, trained or {}),
        step=max(record.step, step),
        trained_tokens=max(record.trained_tokens, tokens),
    )


def trained(record: JobRecord) -> Transition:
    """The last step's state is durable: from here on only the publication is left."""
    return _change(
        record,
        step=record.last_step,
        publishing=True,
        sub_state=SubState.PUBLISHING,
        reason="the adapter is being made servable",
    )


def stopped(record: JobRecord, now: float) -> Transition:
    """The scheduler has given the run up, as asked: paused, cancelled, or queued again."""
    if record.desired == DesiredState.CANCEL:
        return _cancelled(record, now)
    back = _back_to_checkpoint(record)
    if record.desired == DesiredState.PAUSE:
        draft = EventDraft("paused", f"paused at step {record.checkpoint_step}")
        return _change(record, draft, status=JobStatus.PAUSED, desired=DesiredState.RUN, **back)
    return _change(record, _QUEUED, status=JobStatus.QUEUED, **back)


def interrupted(record: JobRecord, why: str, now: float) -> Transition:
    """The run is gone unasked; the job starts again from its checkpoint."""
    if record.desired != DesiredState.RUN:
        return stopped(record, now)
    draft = EventDraft("queued", f"{why}; goes on from step {record.checkpoint_step}", level="warn")
    return _change(record, draft, status=JobStatus.QUEUED, **_back_to_checkpoint(record))


def published(record: JobRecord, now: float, result_files: tuple[str, ...] = ()) -> Transition:
    """The adapter answers under its name."""
    return _change(
        record,
        EventDraft(
            "adapter_published", f"served as {record.adapter_name}", data={"model": record.adapter_name}
        ),
        EventDraft("succeeded", f"the job is done: use model={record.adapter_name}"),
        status=JobStatus.SUCCEEDED,
        finished_at=now,
        fine_tuned_model=record.adapter_name,
        result_files=result_files,
        step=record.last_step,
        **_ENDED | {"reason": evaluations.stopped_early(record) or None},
    )


def adapter_saved(record: JobRecord, path: str, step: int) -> Transition:
    """The adapter's folder is written, from the checkpoint of ``step``."""
    text = f"adapter of step {step} saved in {path}"
    draft = EventDraft("adapter_saved", text, data={"path": path, "step": step})
    return _change(record, draft, published_step=step)


def serve_step(record: JobRecord, step: int) -> Transition:
    """The checkpoint of ``step`` is about to answer under its name."""
    return _change(record, served_steps=tuple(sorted({*record.served_steps, step})))


def steps_left(record: JobRecord, steps: Collection[int]) -> Transition:
    """Of its checkpoints these are left."""
    return _change(record, served_steps=tuple(step for step in record.served_steps if step in steps))


def delete_model(record: JobRecord, name: str) -> Transition:
    """A model of the job is served no more; its name stays in the job, as in OpenAI's API."""
    draft = EventDraft("model_deleted", f"model {name} deleted: it is served no more", data={"model": name})
    return _change(record, draft, deleted_models=(*record.deleted_models, name))


def has_results(record: JobRecord, file: str) -> Transition:
    """The file with the metrics of a job that has succeeded already."""
    return _change(record, result_files=(file,))


def fail(record: JobRecord, code: str, message: str, now: float, param: str | None = None) -> Transition:
    if record.desired == DesiredState.CANCEL:
        return _cancelled(record, now)
    return _change(
        record,
        EventDraft("failed", message, level="error", data={"code": code}),
        status=JobStatus.FAILED,
        finished_at=now,
        error=JobError(code, message, param),
        **_ENDED,
    )


# ------------------------------------------------------------------ what users ask for
def ask_pause(record: JobRecord) -> Transition:
    """Raises StateError where the job is over, or its training is."""
    if record.status == JobStatus.PAUSED:
        return Transition(record)
    if record.status in (JobStatus.QUEUED, JobStatus.VALIDATING_FILES):
        at = f"at step {record.step}" if record.validated else "before its files were looked at"
        return _change(record, EventDraft("paused", f"paused {at}"), status=JobStatus.PAUSED, reason=None)
    _require(record, "paused", JobStatus.RUNNING)
    if record.publishing:
        raise StateError(
            f"job {record.id} cannot be paused: its training is done and the adapter is being published"
        )
    if record.desired == DesiredState.CANCEL:
        raise StateError(f"job {record.id} cannot be paused: it is being cancelled")
    return _change(record, desired=DesiredState.PAUSE, reason="pausing: the state is being saved")


def ask_resume(record: JobRecord) -> Transition:
    if record.status in (JobStatus.QUEUED, JobStatus.VALIDATING_FILES):
        return Transition(record)
    if record.status == JobStatus.PAUSED and not record.validated:
        draft = EventDraft("validating", f"the training file {record.training_file} is to be looked at")
        return _change(record, draft, status=JobStatus.VALIDATING_FILES)
    if record.status == JobStatus.PAUSED:
        return _change(record, _QUEUED, status=JobStatus.QUEUED)
    _require(record, "resumed", JobStatus.RUNNING)
    if record.desired == DesiredState.CANCEL:
        raise StateError(f"job {record.id} cannot be resumed: it is being cancelled")
    return (
        _change(record, desired=DesiredState.RUN, reason=None)
        if record.desired == DesiredState.PAUSE
        else Transition(record)
    )


def ask_cancel(record: JobRecord, now: float, *, in_flight: bool) -> Transition:
    """``in_flight``: a publication was asked for and has no answer yet, which then decides:
    published means succeeded, anything else cancelled."""
    if record.status == JobStatus.CANCELLED:
        return Transition(record)
    waits = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED)
    if record.status in waits or (record.publishing and not in_flight):
        return _cancelled(record, now)
    _require(record, "cancelled", JobStatus.RUNNING)
    return _change(record, desired=DesiredState.CANCEL, reason="cancelling")


def ask_priority(record: JobRecord, priority: int) -> Transition:
    """Its place in the queue, now and whenever it comes back to it."""
    if record.status.final:
        raise StateError(f"job {record.id} is {record.status}: only a job that is not over has a priority")
    if priority == record.priority:
        return Transition(record)
    draft = EventDraft(
        "prioritized", f"priority {priority} (was {record.priority})", data={"priority": priority}
    )
    return _change(record, draft, priority=priority)


def warn(record: JobRecord, message: str, **data: Any) -> Transition:
    return _change(record, EventDraft("warning", message, level="warn", data=data))


def delayed(record: JobRecord, why: str) -> Transition:
    """The job's publication waits; its reason says what for."""
    return _change(record, EventDraft("warning", why, level="warn"), reason=why)


def _cancelled(record: JobRecord, now: float) -> Transition:
    return _change(
        record,
        EventDraft("cancelled", f"cancelled at step {record.step}"),
        status=JobStatus.CANCELLED,
        finished_at=now,
        **_ENDED,
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

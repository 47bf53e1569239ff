"""Jobs and events as OpenAI's API has them, made of the service's."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import Struct, field

from sglang_harli.core import JobStatus
from sglang_harli.errors import NotFoundError
from sglang_harli.managers.http.openai.fine_tuning.create import BASE_LEARNING_RATE
from sglang_harli.protocol.calls.fine_tuning import Checkpoint
from sglang_harli.protocol.public import Event, Hyperparameters, Job, JobError, Slo

ORGANIZATION = "sglang-harli"
EVENT_PREFIX = "ftevent-"
CHECKPOINT_PREFIX = "ftckpt-"
METRICS = ("step_metrics", "eval_metrics")  # our types of events that OpenAI calls ``metrics``
_LEVELS = ("info", "warn", "error")


class HyperparametersShape(Struct, kw_only=True):
    """The numbers that a job trains with; none is ``auto``."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class SupervisedShape(Struct, kw_only=True):
    """``method.supervised``."""

    hyperparameters: HyperparametersShape


class MethodShape(Struct, kw_only=True):
    """How a job trains."""

    type: str = "supervised"
    supervised: SupervisedShape


class HarliShape(Struct, kw_only=True):
    """``harli``: what OpenAI's object has no field for; see docs/jobs.md."""

    sub_state: str | None
    reason: str | None
    step: int
    total_steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_s: float | None
    eta_s: float | None
    attempt: int
    priority: int
    suffix: str | None
    resumed_from: str | None
    base: str | None
    started_at: int | None
    deleted_models: list[str]
    data: dict[str, Any]
    evaluation: dict[str, Any] | None
    best_step: int | None
    best_valid_loss: float | None
    slo: Slo | None
    hyperparameters: Hyperparameters


class JobShape(Struct, kw_only=True):
    """A ``fine_tuning.job``; times in seconds of the Unix clock, UTC."""

    id: str
    object: str = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    status: JobStatus
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    hyperparameters: HyperparametersShape
    method: MethodShape
    metadata: dict[str, str]
    integrations: list[Any] = field(default_factory=list)
    harli: HarliShape


class JobList(Struct, kw_only=True):
    """A page of jobs, newest first."""

    object: str = "list"
    data: list[JobShape]
    has_more: bool
    first_id: str | None
    last_id: str | None


class CheckpointMetrics(Struct, kw_only=True, omit_defaults=True):
    """What is known of a checkpoint's state; the rest is left out."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointShape(Struct, kw_only=True):
    """A ``fine_tuning.job.checkpoint``; ``fine_tuned_model_checkpoint`` answers requests."""

    id: str
    object: str = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class CheckpointList(Struct, kw_only=True):
    """A page of a job's checkpoints, newest first."""

    object: str = "list"
    data: list[CheckpointShape]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventHarli(Struct, kw_only=True):
    """``harli`` of an event: its type and number within the job (docs/jobs.md)."""

    type: str
    number: int


class EventShape(Struct, kw_only=True):
    """A ``fine_tuning.job.event``; ``type`` is message or metrics."""

    id: str
    object: str = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]
    harli: EventHarli


class EventList(Struct, kw_only=True):
    """A page of a job's events, newest first."""

    object: str = "list"
    data: list[EventShape]
    has_more: bool
    first_id: str | None
    last_id: str | None


def job_shape(job: Job) -> JobShape:
    hp = job.hyperparameters
    shown = HyperparametersShape(
        n_epochs=hp.n_epochs,
        batch_size=hp.batch_size * hp.gradient_accumulation_steps,
        learning_rate_multiplier=float(f"{hp.learning_rate / BASE_LEARNING_RATE:.12g}"),
    )
    now = time.time()  # stamp: of an estimate
    return JobShape(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=_seconds(job.finished_at),
        estimated_finish=int(now + job.eta_s) if job.eta_s is not None else None,
        model=job.model or "",
        fine_tuned_model=job.fine_tuned_model,
        status=job.status,
        training_file=job.training_file or "",
        validation_file=job.validation_file,
        result_files=job.result_files,
        trained_tokens=job.trained_tokens,
        error=job.error,
        seed=hp.seed,
        hyperparameters=shown,
        method=MethodShape(supervised=SupervisedShape(hyperparameters=shown)),
        metadata=job.metadata,
        harli=HarliShape(
            sub_state=job.sub_state,
            reason=job.reason,
            step=job.step,
            total_steps=job.total_steps,
            loss=job.loss,
            learning_rate=job.learning_rate,
            tokens_per_s=job.tokens_per_s,
            eta_s=job.eta_s,
            attempt=job.attempt,
            priority=job.priority,
            suffix=job.suffix,
            resumed_from=job.resumed_from,
            base=job.base,
            started_at=_seconds(job.started_at),
            deleted_models=job.deleted_models,
            data=job.data,
            evaluation=job.evaluation,
            best_step=job.best_step,
            best_valid_loss=job.best_valid_loss,
            slo=job.slo,
            hyperparameters=hp,
        ),
    )


def event_shape(event: Event) -> EventShape:
    metrics = event.type in METRICS
    return EventShape(
        id=event_id(event.job, event.id),
        created_at=int(event.created_at),
        level=event.level if event.level in _LEVELS else "info",
        message=event.message,
        type="metrics" if metrics else "message",
        data=_metrics(event.data) if metrics else event.data,
        harli=EventHarli(type=event.type, number=event.id),
    )


def _metrics(data: dict[str, Any]) -> dict[str, Any]:
    """A step's values, its loss by OpenAI's name."""
    return {"train_loss" if name == "loss" else name: value for name, value in data.items()}


def event_id(job: str, number: int) -> str:
    return f"{EVENT_PREFIX}{job}-{number}"


def event_number(job: str, given: str) -> int:
    """The number in an event's id; NotFoundError: it is not one of this job's."""
    return _number_behind(f"{EVENT_PREFIX}{job}-", given, f"there is no event {given[:80]!r} of job {job}")


def _number_behind(prefix: str, given: str, text: str) -> int:
    number = given.removeprefix(prefix)
    if not given.startswith(prefix) or not (number.isascii() and number.isdigit() and len(number) < 16):
        raise NotFoundError(text, param="after")
    return int(number)


def checkpoint_shape(job: str, found: Checkpoint) -> CheckpointShape:
    return CheckpointShape(
        id=f"{_checkpoint_prefix(job)}{found.step}",
        created_at=int(found.created_at),
        fine_tuned_model_checkpoint=found.model,
        fine_tuning_job_id=job,
        step_number=found.step,
        metrics=msgspec.convert(found.metrics | {"step": found.step}, CheckpointMetrics),
    )


def _checkpoint_prefix(job: str) -> str:
    return f"{CHECKPOINT_PREFIX}{job.removeprefix('ftjob-')}-"


def checkpoint_step(job: str, given: str) -> int:
    """The step in a checkpoint's id; NotFoundError: it is not one of this job's."""
    return _number_behind(
        _checkpoint_prefix(job), given, f"there is no checkpoint {given[:80]!r} of job {job}"
    )


def _seconds(when: float | None) -> int | None:
    return None if when is None else int(when)

"""A job as the store keeps it, and what a change of it is made of."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from sglang_harli.core import JobStatus, SubState
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.internal import EvaluationState
from sglang_harli.protocol.public import Hyperparameters, Job, JobError


class DesiredState(enum.StrEnum):
    """What the user wants of a running job."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Asked(Struct, frozen=True, kw_only=True):
    """What a submit asked for; one with the same idempotency key must ask the same."""

    sha256: str
    suffix: str | None = None
    resume_from: str | None = None
    priority: int = 0
    validation_sha256: str = ""
    hyperparameters: dict[str, Any] = msgspec.field(default_factory=dict)  # those named
    training_file: str | None = None
    validation_file: str | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    model: str | None = None


class CheckpointMetrics(Struct, frozen=True, kw_only=True):
    """A checkpoint that is kept, and what is known of its state; None: it is not.

    Attributes:
        train_loss, train_mean_token_accuracy: of the optimizer step that led to it.
        valid_loss, valid_mean_token_accuracy: of the rows that each evaluation takes.
        full_valid_loss, full_valid_mean_token_accuracy: of all validation rows.
    """

    step: int
    created_at: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobRecord(Struct, frozen=True, kw_only=True):
    """A job as the store keeps it: the public fields and what only the service needs."""

    id: str
    number: int  # order of creation; the order of the queue among equal priorities
    created_at: float
    status: JobStatus
    hyperparameters: Hyperparameters
    model: str
    adapter_name: str
    total_steps: int
    data: dict[str, Any]
    data_sha256: str = ""
    suffix: str | None = None
    idempotency_key: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    sub_state: SubState | None = None
    reason: str | None = None
    fine_tuned_model: str | None = None
    step: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    attempt: int = 0
    error: JobError | None = None
    desired: DesiredState = msgspec.field(default=DesiredState.RUN, name="wish")  # in the store since 0.1
    publishing: bool = False  # trained and saved; the adapter's publication remains
    checkpoint_step: int = 0  # of the last durable ``state`` checkpoint (0: none)
    checkpoint_tokens: int = 0  # trained tokens in it
    last_event: int = 0  # id of the newest event
    metrics_attempt: int = 0  # with the next one: the newest step whose metrics are stored
    metrics_step: int = 0  # at an attempt's start the step that it starts from
    priority: int = 0  # higher ones leave the queue first
    resumed_from: str | None = None  # the job whose checkpoint this one began with
    carried: bool = False  # only its adapter, as ``step-0``, without which there is no start
    asked: Asked | None = None  # to recognise a repeated submit; None: no key, or version 0.1
    base: BasePrint | None = None  # None: version 0.1, or accepted before a server's first hello
    admitted: bool = True  # its size was checked against a server's limits
    validated: bool = True  # its files were looked at, and are accepted
    training_file: str | None = None  # the file that its data came from, which may be deleted since
    validation_file: str | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    train_mean_token_accuracy: float | None = None  # of the step that ``loss`` is of
    evaluation: dict[str, Any] | None = None  # the last one, as its event has it
    evaluation_state: EvaluationState = EvaluationState()  # of the run: it goes back with it
    evaluated_step: int = 0  # the highest one whose evaluation has an event
    checkpoints: list[CheckpointMetrics] = []  # those that are kept, rising

    @property
    def evaluates(self) -> bool:
        """Whether it has rows that are evaluated."""
        return bool(self.data.get("validation") or self.data.get("validation_rows"))

    @property
    def stops_early(self) -> bool:
        patience = self.hyperparameters.early_stopping_patience
        return self.evaluation_state.stops(patience, self.total_steps)

    @property
    def last_step(self) -> int:
        """Where its training ends, as far as it is known."""
        return self.evaluation_state.step if self.stops_early else self.total_steps

    @property
    def complete(self) -> bool:
        """Whether the state of its last step is saved and, where there is validation data,
        evaluated: all that is left is the publication."""
        evaluated = not self.evaluates or self.evaluation_state.step == self.last_step
        return self.checkpoint_step == self.last_step and evaluated

    @property
    def best_step(self) -> int | None:
        return self.evaluation_state.best_step or None

    @property
    def best_valid_loss(self) -> float | None:
        return self.evaluation_state.best_loss

    published_step: int | None = None  # of the state that its model is; None: the last, or not yet
    served_steps: tuple[int, ...] = ()  # of checkpoints that answer, or did before they were evicted
    deleted_models: tuple[str, ...] = ()  # names of its models that are served no more, for good
    result_files: tuple[str, ...] = ()  # those that were made of its metrics; they may be deleted since

    @property
    def model_step(self) -> int:
        """Of the state that its model is, or will be as far as it is known."""
        return self.last_step if self.published_step is None else self.published_step

    @property
    def eta_s(self) -> float | None:
        if self.status != JobStatus.RUNNING or self.step_s is None:
            return None
        return round(self.step_s * max(self.total_steps - self.step, 0), 3)


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event before it has an id and a time."""

    type: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Transition:
    """The record after a transition, and the events that tell of it."""

    record: JobRecord
    drafts: tuple[EventDraft, ...] = ()


_PUBLIC = set(Job.__struct_fields__) - {"object", "run_dir", "base", "slo"}  # of the record as they are


def public(record: JobRecord, run_dir: str) -> Job:
    """The job object that clients see; ``run_dir`` is the job's own folder."""
    base = record.base.shown if record.base is not None else None
    return Job(**{name: getattr(record, name) for name in _PUBLIC}, run_dir=run_dir, base=base)

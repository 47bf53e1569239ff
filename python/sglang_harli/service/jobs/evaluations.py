"""What evaluations change in a job's record, and which checkpoint is the best one (pure)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from sglang_harli.protocol.internal import EvaluationDone, EvaluationState
from sglang_harli.service.jobs.record import CheckpointMetrics, EventDraft, JobRecord, Transition

VALUES = ("valid_loss", "valid_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy")


def evaluated(record: JobRecord, message: EvaluationDone) -> Transition:
    """The rows behind a step were evaluated.  One that is repeated after a restart changes the
    record as it did, and has its event already."""
    values = {name: _finite(getattr(message, name)) for name in VALUES}
    data = {
        "step": message.step,
        "epoch": message.epoch,
        **values,
        "rows": message.rows,
        "target_tokens": message.target_tokens,
        "attempt": message.attempt,
    }
    new = msgspec.structs.replace(
        record,
        evaluation_state=message.state,
        evaluated_step=max(record.evaluated_step, message.step),
        evaluation=data,
        checkpoints=[
            msgspec.structs.replace(kept, **values) if kept.step == message.step else kept
            for kept in record.checkpoints
        ],
    )
    if message.step <= record.evaluated_step:
        return Transition(new)
    drafts = [EventDraft("eval_metrics", _text(new, data), data=data)]
    if reason := stopped_early(new):
        about = {"step": message.step, "total_steps": new.total_steps}
        about |= {"best_step": new.best_step, "best_valid_loss": new.best_valid_loss}
        drafts.append(EventDraft("early_stopped", reason, data=about))
    return Transition(new, tuple(drafts))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(record: JobRecord, data: dict[str, Any]) -> str:
    loss, accuracy = data["valid_loss"], data["valid_mean_token_accuracy"]
    shown = "not finite" if loss is None else f"{loss:.4f}"
    best = ", the best so far" if record.best_step == data["step"] else ""
    return (
        f"step {data['step']}/{record.total_steps}, valid_loss {shown}, token accuracy {accuracy:.4f}{best}"
    )


def stopped_early(record: JobRecord) -> str:
    """Why a job ended before its last step; "": it did not."""
    state, patience = record.evaluation_state, record.hyperparameters.early_stopping_patience
    if not record.stops_early:
        return ""
    best = "it was never finite"
    if state.best_loss is not None:
        best = f"the best is {state.best_loss:.4f} at step {state.best_step}"
    times = f"{patience} evaluation{'s' if patience != 1 else ''}"
    return f"stopped early at step {state.step} of {record.total_steps}: valid_loss has not improved in {times} ({best})"


def go_back(record: JobRecord, step: int, saved: EvaluationState) -> JobRecord:
    """The record of a run that goes on from the checkpoint of ``step``, which has ``saved``: what
    was evaluated behind it is evaluated again."""
    if record.evaluation_state.step <= step:
        return record
    return msgspec.structs.replace(record, evaluation_state=saved)


def with_checkpoint(record: JobRecord, step: int, trained: Mapping[str, Any]) -> list[CheckpointMetrics]:
    """The checkpoints of a job with that of ``step``, rising, and what is known of it; ``trained``:
    of the step itself."""
    known = dict(trained)
    if record.evaluation is not None and record.evaluation["step"] == step:
        known |= {name: record.evaluation[name] for name in VALUES}
    new = CheckpointMetrics(step=step, created_at=time.time(), **known)  # stamp: of a checkpoint
    return sorted([*(c for c in record.checkpoints if c.step != step), new], key=lambda c: c.step)


def with_step(record: JobRecord, step: int, metrics: Mapping[str, Any]) -> list[CheckpointMetrics]:
    """The checkpoints of a job, that of ``step`` with the ``metrics`` of the step."""
    if all(kept.step != step for kept in record.checkpoints):
        return record.checkpoints
    found = {
        "train_loss": metrics["loss"],
        "train_mean_token_accuracy": metrics.get("train_mean_token_accuracy"),
    }
    return [msgspec.structs.replace(c, **found) if c.step == step else c for c in record.checkpoints]


def left(record: JobRecord, steps: set[int]) -> Transition:
    """Of the checkpoints those of ``steps`` are still there."""
    kept = [checkpoint for checkpoint in record.checkpoints if checkpoint.step in steps]
    return Transition(msgspec.structs.replace(record, checkpoints=kept))


def best_first(record: JobRecord) -> list[int]:
    """The steps of the checkpoints whose ``valid_loss`` is known, the best one first."""
    known = [(c.valid_loss, c.step) for c in record.checkpoints if c.valid_loss is not None]
    return [step for _, step in sorted(known)]


def to_publish(record: JobRecord) -> list[int]:
    """The checkpoints that may be published, the one that is to be first; the others are for where
    its files are damaged."""
    wanted = best_first(record) if record.hyperparameters.publish_best else []
    return list(dict.fromkeys([*wanted, record.checkpoint_step]))

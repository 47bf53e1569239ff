"""The checkpoints of a job that can be had, each with the name of its model and what is known of it
(in a thread that reads the store)."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sglang_harli.protocol.calls.fine_tuning import Checkpoint
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.store import JobStore
from sglang_harli.service.publish.adapter_names import is_deleted, name_of

PAGE = 1000  # events that are read at once
# By type of event: its values by OpenAI's names.
SOURCES = {
    "step_metrics": {
        "train_loss": "loss",
        "train_mean_token_accuracy": "train_mean_token_accuracy",
    },
    "eval_metrics": {
        name: name
        for name in (
            *("valid_loss", "valid_mean_token_accuracy"),
            *("full_valid_loss", "full_valid_mean_token_accuracy"),
        )
    },
}


def page(
    record: JobRecord, paths: JobPaths, store: JobStore, before: int | None, limit: int
) -> tuple[list[Checkpoint], bool]:
    """Checkpoints of steps below ``before``, the newest first, and whether there are more."""
    steps = [step for step in reversed(there(record, paths)) if before is None or step < before]
    shown = steps[:limit]
    known = metrics(record, store, shown)
    found = []
    for step in shown:
        created_at = _created_at(paths, step)
        if created_at is not None:
            found.append(
                Checkpoint(step=step, created_at=created_at, model=name_of(record, step), metrics=known[step])
            )
    return found, len(steps) > limit


def there(record: JobRecord, paths: JobPaths) -> list[int]:
    """The steps whose checkpoint is on the disk, known to the store, and not deleted as a model."""
    found = checkpoints.steps(paths.checkpoints)
    return [step for step in found if 0 < step <= record.checkpoint_step and not is_deleted(record, step)]


def metrics(record: JobRecord, store: JobStore, steps: Collection[int]) -> dict[int, dict[str, Any]]:
    """What is known of the states of these steps: from the newest event back to the step's own."""
    found: dict[int, dict[str, Any]] = {step: {} for step in steps}
    open_steps, before = set(steps), None
    while open_steps:
        events = store.events_before(record.id, before, PAGE, types=tuple(SOURCES))
        for event in events:
            step = event.data.get("step")
            if step not in open_steps:
                continue
            values = {name: event.data.get(ours) for name, ours in SOURCES[event.type].items()}
            found[step] |= {name: value for name, value in values.items() if value is not None}
            if event.type == "step_metrics":
                open_steps.discard(step)
        if len(events) < PAGE:
            break
        before = events[-1].id
    return found


def _created_at(paths: JobPaths, step: int) -> float | None:
    """When the checkpoint was written; None: it is gone since, or not whole."""
    try:
        meta = json.loads((paths.checkpoints / f"step-{step}" / "meta.json").read_bytes())
        return float(meta["created_at"])
    except (OSError, ValueError, LookupError, TypeError):
        return None

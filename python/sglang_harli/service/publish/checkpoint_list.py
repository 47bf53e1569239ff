"""The checkpoints of a job that can be had, each with the name of its model and what is known of it
(in a thread: the disk is read)."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_harli.protocol.calls.fine_tuning import Checkpoint
from sglang_harli.service.checkpoint import checkpoints, listing
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import CheckpointMetrics, JobRecord
from sglang_harli.service.publish.adapter_names import is_deleted, name_of


def page(record: JobRecord, paths: JobPaths, before: int | None, limit: int) -> tuple[list[Checkpoint], bool]:
    """Checkpoints of steps below ``before``, the newest first, and whether there are more."""
    found = [
        known
        for known in listing.with_metrics(record, paths)
        if not is_deleted(record, known.step) and (before is None or known.step < before)
    ]
    shown = [
        Checkpoint(
            step=known.step,
            created_at=known.created_at,
            model=name_of(record, known.step),
            metrics=_values(known),
        )
        for known in found[:limit]
    ]
    return shown, len(found) > limit


def there(record: JobRecord, paths: JobPaths) -> list[int]:
    """The steps whose checkpoint is on the disk, known to the store, and not deleted as a model."""
    found = checkpoints.steps(paths.checkpoints)
    return [step for step in found if 0 < step <= record.checkpoint_step and not is_deleted(record, step)]


def _values(known: CheckpointMetrics) -> dict[str, Any]:
    """What is known of a state, by OpenAI's names."""
    values = msgspec.to_builtins(known)
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in ("step", "created_at")
    }

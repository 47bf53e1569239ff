"""The checkpoints of a job that can be had, each with what is known of its state."""

from __future__ import annotations

from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import CheckpointMetrics, JobRecord


def with_metrics(record: JobRecord, paths: JobPaths) -> list[CheckpointMetrics]:
    """The newest first; blocking.  Of one that a version before wrote only step and time are known.
    Not those that the store does not know (yet), nor the adapter that a job began with."""
    known = {checkpoint.step: checkpoint for checkpoint in record.checkpoints}
    found = []
    for step in reversed(checkpoints.steps(paths.checkpoints)):
        if not 0 < step <= record.checkpoint_step:
            continue
        if step in known:
            found.append(known[step])
        elif (created_at := checkpoints.created_at(paths.checkpoints, step)) is not None:
            found.append(CheckpointMetrics(step=step, created_at=created_at))
    return found

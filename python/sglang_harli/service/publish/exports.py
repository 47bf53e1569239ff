"""PEFT folders of a job's checkpoints: ``adapters/step-N`` beside ``checkpoints/step-N``, made when
the checkpoint is first asked for, and gone with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.jobs.folder import JobPaths


def folder(paths: JobPaths, step: int) -> Path:
    """Where the adapter of a checkpoint lies once it was asked for."""
    return paths.adapters / f"step-{step}"


def remove(paths: JobPaths, step: int) -> None:
    """The checkpoint of ``step`` is written anew, or gone.  What stays goes with the next prune."""
    shutil.rmtree(folder(paths, step), ignore_errors=True)


def prune(paths: JobPaths) -> set[int]:
    """Remove the adapters of checkpoints that are gone; the steps of those that are there."""
    left = set(checkpoints.steps(paths.checkpoints))
    for step in checkpoints.steps(paths.adapters):
        if step not in left:
            remove(paths, step)
    return left

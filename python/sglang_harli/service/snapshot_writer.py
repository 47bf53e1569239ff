"""Snapshots that lie in shared memory become checkpoints on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.fault_points import Point, reach
from sglang_harli.protocol import internal
from sglang_harli.service import checkpoints, jobs
from sglang_harli.service.desk import JobDesk
from sglang_harli.service.job_files import JobPaths

logger = logging.getLogger(__name__)

# A snapshot in passing is given up soon (the next one comes), the last one of a run is worth waiting for.
PAUSES_S = (1.0, 2.0)
LAST_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)


class SnapshotWriter:
    """Args:
    desk: the jobs.
    disk: where blocking work runs.
    send: to the scheduler.
    """

    def __init__(self, desk: JobDesk, disk: Executor, send: Callable[[internal.Message], bool]) -> None:
        self._desk = desk
        self._disk = disk
        self._send = send
        self._writing: dict[tuple[str, int, int], asyncio.Task[bool]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._writing)

    async def save(self, message: internal.SnapshotReady, tokens: int) -> bool:
        """Write a snapshot, commit it and tell the scheduler; false where it was given up.

        Args:
            tokens: run through the model so far, where the snapshot's own ``meta`` does not say.
        """
        key = (message.job, message.attempt, message.step)
        task = self._writing.get(key)  # a snapshot that was announced twice is written once
        if task is None:
            task = self._writing[key] = asyncio.create_task(self._save(message, tokens))
            task.add_done_callback(lambda _: self._writing.pop(key))
        saved = await task
        self._send(
            internal.SnapshotSaved(job=message.job, attempt=message.attempt, step=message.step, ok=saved)
        )
        return saved

    async def _save(self, message: internal.SnapshotReady, tokens: int) -> bool:
        record = self._desk.find(message.job)
        if record is None or (record.status.final and not record.publishing):
            return False
        if message.attempt != record.attempt:
            return False
        if record.checkpoint_step >= message.step:  # announced again after a restart of this service
            return True
        paths = JobPaths(self._desk.run_dir, record.id)
        told = message.meta.get("tokens")
        tokens = told if isinstance(told, int) else tokens
        if not await self._write(message, paths, tokens):
            return False
        record = self._desk.get(message.job)
        change = jobs.checkpoint_saved(record, message.step, tokens, message.reason)
        done = message.step == record.total_steps and record.status == JobStatus.RUNNING
        if done and record.wish != jobs.Wish.CANCEL:
            change = jobs.Change(
                jobs.trained(change.record).record, change.drafts
            )  # one commit: both or none
        await self._desk.apply(change)
        reach(Point.STORE_COMMITTED)
        await self._off(checkpoints.prune, paths.checkpoints)
        return True

    async def _write(self, message: internal.SnapshotReady, paths: JobPaths, tokens: int) -> bool:
        pauses = PAUSES_S if message.reason == "every" else LAST_PAUSES_S
        for pause_s in (*pauses, None):
            try:
                await self._off(
                    checkpoints.save_state,
                    paths.checkpoints,
                    message.step,
                    message.slot,
                    message.meta,
                    tokens,
                )
                return True
            except OSError as error:
                again = f"trying again in {pause_s:g} s" if pause_s else "given up"
                text = f"the checkpoint of step {message.step} cannot be written ({error}): {again}"
                self._desk.apply(jobs.warn(self._desk.get(message.job), text))
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        return False

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

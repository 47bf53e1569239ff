"""Snapshots that lie in shared memory become checkpoints on disk."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

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
    """

    def __init__(self, desk: JobDesk, disk: Executor) -> None:
        self._desk = desk
        self._disk = disk
        self._turn = asyncio.Lock()  # what is half written must not be taken for a crash's leftovers

    async def write(self, message: internal.SnapshotReady) -> bool:
        """Write a snapshot; durable on return, or false where it was given up."""
        paths = JobPaths(self._desk.run_dir, message.job)
        told = message.meta.get("tokens")
        tokens = told if isinstance(told, int) else self._desk.get(message.job).trained_tokens
        pauses = PAUSES_S if message.reason == "every" else LAST_PAUSES_S
        for pause_s in (*pauses, None):
            try:
                async with self._turn:
                    await self._off(
                        functools.partial(
                            checkpoints.save_state,
                            paths.checkpoints,
                            message.step,
                            message.slot,
                            message.meta,
                            tokens,
                            rush=message.reason == "shutdown",
                        )
                    )
                return True
            except OSError as error:
                again = f"trying again in {pause_s:g} s" if pause_s else "given up"
                text = f"the checkpoint of step {message.step} cannot be written ({error}): {again}"
                self._desk.apply(jobs.warn(self._desk.get(message.job), text))
            if pause_s is None or self._desk.get(message.job).status.final:  # cancelled: nobody needs it
                break
            await asyncio.sleep(pause_s)
        return False

    async def prune(self, job: str) -> None:
        """Remove older checkpoints than are kept."""
        folder = JobPaths(self._desk.run_dir, job).checkpoints
        async with self._turn:
            await self._off(checkpoints.prune, folder, self._desk.keep_checkpoints)

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

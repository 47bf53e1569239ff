"""Snapshots that lie in shared memory become checkpoints on disk."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from sglang_harli.protocol import internal, shared_memory, trouble
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.jobs import evaluations, transitions
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.publish import exports
from sglang_harli.service.run.prepare import UNREADABLE
from sglang_harli.service.run.state import IN_PASSING, Unwritten

# Of a snapshot in passing: the next one comes.  That of a run that stops or ends is tried for ever.
TRIES_IN_PASSING = 3


class SnapshotWriter:
    """Makes a snapshot in shared memory a durable checkpoint."""

    def __init__(self, registry: JobRegistry, disk: Executor) -> None:
        self._registry = registry
        self._disk = disk
        self._turn = asyncio.Lock()  # what is half written must not be taken for a crash's leftovers

    async def write(
        self, message: internal.SnapshotReady, delayed: Callable[[str], None]
    ) -> Unwritten | None:
        """Write a snapshot; None: it is durable, else why it was given up.  ``delayed`` is called
        with why it is not written yet."""
        tries = 0
        while True:
            try:
                await self._save(message)
                return None
            except UNREADABLE as error:
                wrong = error
            tries += 1
            text = _text(message, wrong)
            lasting = not isinstance(wrong, OSError | MemoryError)  # it would be so the next time
            # The slot is gone, or it is not what it was.
            lost = isinstance(wrong, shared_memory.SharedBufferError) and not trouble.passes(wrong)
            passed = message.reason in IN_PASSING and tries == TRIES_IN_PASSING
            if lasting or lost or passed or _is_over(self._registry.get(message.job)):
                break
            again = f"{text}: trying again in {trouble.pause_s(tries):g} s"
            self._warn(message.job, again)
            delayed(again)
            # The queue waits for this: a cancelled job ends the pause.
            if _is_over(await self._registry.wait_in_memory(message.job, _is_over, trouble.pause_s(tries))):
                break
        self._warn(message.job, f"{text}: given up")
        return Unwritten(text, lasting=lasting)

    async def _save(self, message: internal.SnapshotReady) -> None:
        paths = JobPaths(self._registry.run_dir, message.job)
        counted = message.meta.get("tokens")
        tokens = counted if isinstance(counted, int) else self._registry.get(message.job).trained_tokens
        save = functools.partial(_save_state, paths, rush=message.reason == "shutdown")
        async with self._turn:
            await self._off(save, message.step, message.slot, message.meta, tokens)

    def _warn(self, job: str, text: str) -> None:
        self._registry.apply(transitions.warn(self._registry.get(job), text))

    async def prune(self, job: str) -> None:
        """Remove older checkpoints than are kept, but not the best one by its evaluation; what
        cannot be removed goes with the next."""
        paths = JobPaths(self._registry.run_dir, job)
        async with self._turn:
            best = evaluations.best_first(self._registry.get(job))[:1]
            try:
                kept = await self._off(
                    checkpoints.prune, paths.checkpoints, self._registry.keep_checkpoints, best
                )
                left = await self._off(exports.prune, paths)
            except OSError as error:
                self._warn(job, f"older checkpoints cannot be removed ({error})")
                return
        record = self._registry.get(job)
        if {checkpoint.step for checkpoint in record.checkpoints} - kept:
            self._registry.apply(evaluations.left(record, kept), urgent=False)
        record = self._registry.get(job)
        if not left.issuperset(record.served_steps):
            self._registry.apply(transitions.steps_left(record, left), urgent=False)

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)


def _save_state(paths: JobPaths, step: int, *args: Any, rush: bool) -> None:
    exports.remove(paths, step)  # of a state of this step before, which is replaced
    checkpoints.save_state(paths.checkpoints, step, *args, rush=rush)


def _is_over(record: JobRecord) -> bool:
    """Whether its snapshots are not needed any more."""
    return record.status.final


def _text(message: internal.SnapshotReady, error: BaseException) -> str:
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return f"the checkpoint of step {message.step} cannot be written ({what})"

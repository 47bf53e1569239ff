"""From a finished run's last checkpoint to an adapter that answers: one at a time, every step repeatable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.fault_points import Point, reach
from sglang_harli.protocol.adapter_config import adapter_config
from sglang_harli.protocol.internal import PublishAdapter
from sglang_harli.service import checkpoints, jobs
from sglang_harli.service.checkpoints import CheckpointError
from sglang_harli.service.desk import JobDesk
from sglang_harli.service.http_link import HttpLink
from sglang_harli.service.job_files import JobPaths
from sglang_harli.service.jobs import Draft, JobRecord

logger = logging.getLogger(__name__)

TRIES = 3  # of a publication that the HTTP process refuses, and of a write that fails
PAUSE_S = 1.0  # after the first failure; doubled each time
ANSWER_S = 120.0  # an adapter's slices are loaded between decode batches, so this may take a while


class Publication:
    """Args:
        desk: the jobs.
        http: the pair to the HTTP process.
        disk: where blocking work runs.
        shm: folder of slots.
        model_path: of the base, for adapter_config.json.

    Attributes:
        in_flight: the job whose publication the HTTP process has been asked for and has not answered.
    """

    def __init__(self, desk: JobDesk, http: HttpLink, disk: Executor, shm: Path, model_path: str) -> None:
        self._desk = desk
        self._http = http
        self._disk = disk
        self._shm = shm
        self._model_path = model_path
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self.in_flight: str | None = None
        for record in desk.all():
            if record.status == JobStatus.RUNNING and record.publishing:
                self.want(record.id)

    def want(self, job: str) -> None:
        """Publish a job's adapter, now or again."""
        if job not in self._queued:
            self._queued.add(job)
            self._queue.put_nowait(job)

    def want_name(self, name: str) -> None:
        """The HTTP process misses an adapter that it had (or that an earlier server had)."""
        for record in self._desk.all():
            if record.fine_tuned_model == name:
                self.want(record.id)
                return
        logger.warning("an unknown adapter was asked for: %s", name)

    def names(self) -> list[str]:
        """The adapters of succeeded jobs."""
        return [r.fine_tuned_model for r in self._desk.all() if r.fine_tuned_model]

    async def run(self) -> None:
        while True:
            job = await self._queue.get()
            self._queued.discard(job)
            await self._one(job)

    async def _one(self, job: str) -> None:
        if not self._wanted(job):
            return
        paths = JobPaths(self._desk.run_dir, job)
        try:
            if not paths.adapter.is_dir():
                await self._save(self._desk.get(job), paths)
            refusal = await self._publish(job, paths)
        except (OSError, CheckpointError) as error:
            self._give_up(job, "adapter_failed", f"the adapter cannot be saved or read: {error}")
            return
        if refusal is not None:
            self._give_up(
                job,
                "publication_failed",
                f"the adapter is trained and saved in {paths.adapter}, but cannot be served: {refusal}",
            )

    def _wanted(self, job: str) -> bool:
        record = self._desk.get(job)
        return record.publishing or record.status == JobStatus.SUCCEEDED

    async def _save(self, record: JobRecord, paths: JobPaths) -> None:
        config = adapter_config(record.hyperparameters, self._model_path)
        step = record.checkpoint_step
        await self._again(
            lambda: self._off(checkpoints.save_adapter, paths.adapter, paths.checkpoints, step, config)
        )
        record = self._desk.get(record.id)
        drafts = (
            Draft("adapter_saved", f"adapter saved in {paths.adapter}", data={"path": str(paths.adapter)}),
        )
        await self._desk.apply(jobs.Change(record, drafts))

    async def _publish(self, job: str, paths: JobPaths) -> str | None:
        """Ask until there is an answer; None when the adapter answers, else why it does not."""
        refused = 0
        while True:
            await self._http.ready.wait()
            if not self._wanted(job):  # cancelled while it waited
                return None
            record = self._desk.get(job)
            slot, ref, config = await self._off(checkpoints.load_adapter, paths.adapter, self._shm)
            reach(Point.TENSORS_SHARED)
            self.in_flight = job
            try:
                message = PublishAdapter(job=job, name=record.adapter_name, config=config, slot=ref)
                answer = await self._http.publish(message, ANSWER_S)
            finally:
                self.in_flight = None
                slot.unlink()
            if answer is None:
                continue
            if answer.ok:
                if self._desk.get(job).publishing:
                    await self._desk.apply(jobs.published(self._desk.get(job), time.time()))
                return None
            refused += 1
            if refused == TRIES or not self._retry(job, answer.text):
                return answer.text or answer.code
            await asyncio.sleep(PAUSE_S * 2 ** (refused - 1))

    def _retry(self, job: str, text: str) -> bool:
        record = self._desk.get(job)
        if record.wish == jobs.Wish.CANCEL:
            return False
        self._desk.apply(jobs.warn(record, f"publication failed, trying again: {text}"))
        return True

    def _give_up(self, job: str, code: str, message: str) -> None:
        record = self._desk.get(job)
        if record.publishing:
            self._desk.apply(jobs.fail(record, code, message, time.time()))
        else:  # it succeeded once: the job stays what it is
            self._desk.apply(jobs.warn(record, message))

    async def _again(self, call: Callable[[], Awaitable[Any]]) -> None:
        for failures in range(1, TRIES + 1):
            try:
                await call()
                return
            except OSError:
                if failures == TRIES:
                    raise
            await asyncio.sleep(PAUSE_S * 2 ** (failures - 1))

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

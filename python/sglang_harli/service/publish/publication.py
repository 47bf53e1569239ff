"""From a run's last checkpoint to a served adapter: one at a time, every step repeatable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError
from sglang_harli.failpoints import Failpoint, failpoint
from sglang_harli.protocol import shared_memory, trouble
from sglang_harli.protocol.internal import AdapterPublished, SlotRef
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.transitions import EventDraft
from sglang_harli.service.links.http_link import HttpLink
from sglang_harli.service.publish.adapter_names import AdapterNames
from sglang_harli.service.publish.peft_config import adapter_config

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

TRIES = 3  # of a publication that the HTTP process refuses
PAUSES_S = (1.0, 2.0, 4.0)  # between the tries of a write while a request waits, and of a publication
ANSWER_S = 120.0  # an adapter's slices are loaded between decode batches, so this may take a while


class _GivenUpError(HarliError):
    """It was tried often enough; the message is for the job."""


class _PutOffError(HarliError):
    """Trouble of the environment at a first publication: other jobs' come before the next try."""


class PublicationQueue:
    """Trained adapters on their way to being served, one at a time.  ``model_path``: of the served
    base, for the adapter_config.json of a job whose base is not recorded.  ``results``: makes the
    result files of a job that is about to succeed; their ids."""

    def __init__(
        self,
        registry: JobRegistry,
        http: HttpLink,
        disk: Executor,
        shm: Path,
        model_path: str,
        names: AdapterNames,
        results: Callable[[str], Awaitable[tuple[str, ...]]],
    ) -> None:
        self._registry = registry
        self._http = http
        self._disk = disk
        self._shm = shm
        self._model_path = model_path
        self._results = results
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self.in_flight: str | None = None  # the job whose publication was asked for, until the answer
        self._base_known = False  # a hello of the scheduler has been read
        self._waiting: set[str] = set()  # jobs whose base is not served
        self._troubles: dict[str, int] = {}  # in a row, of jobs that were put off
        self._names = names
        for record in registry.all():
            if record.status == JobStatus.RUNNING and record.publishing:
                self.want(record.id)

    def want(self, job: str) -> None:
        """Publish a job's adapter, now or again."""
        if job not in self._queued:
            self._queued.add(job)
            self._queue.put_nowait(job)

    def want_name(self, name: str) -> None:
        """The HTTP process misses an adapter that it or an earlier server had."""
        record = self._names.find(name)
        if record is None:
            logger.warning("an unknown adapter was asked for: %s", name)
            self._http.refuse(name, "not_found", "no job of this run directory has made it")
        elif name in record.deleted_models:
            self._http.refuse(name, "not_found", "it was deleted")
        elif other := self._registry.other_base(record):
            self._http.refuse(name, "other_base", other)
        else:
            self.want(record.id)

    def names(self) -> list[str]:
        """The adapters of succeeded jobs on the served base; none before that is known."""
        return self._names.here() if self._base_known else []

    def others(self) -> dict[str, list[str]] | None:
        """The other adapters, by the sentence on their base; None before a base is known."""
        return self._names.elsewhere() if self._base_known else None

    def base_known(self) -> None:
        """The scheduler has said which base it serves: publish what waited for that."""
        self._base_known = True
        waiting, self._waiting = self._waiting, set()
        for job in waiting:
            self.want(job)

    async def run(self) -> None:
        while True:
            job = await self._queue.get()
            self._queued.discard(job)
            try:
                await self._one(job)
            except Exception as error:  # boundary: one adapter is tried again later; the others come
                logger.exception("the adapter of job %s cannot be published", job)
                self._put_off(job, f"the adapter cannot be published ({type(error).__name__}: {error})")

    async def _one(self, job: str) -> None:
        paths = JobPaths(self._registry.run_dir, job)
        try:
            if self._other_base(job):
                return
            refusal = await self._publish(job, paths)
        except _GivenUpError as error:
            self._give_up(job, error.code, error.message)
            return
        except _PutOffError as error:
            self._put_off(job, error.message)
            return
        except CheckpointError as error:
            damage = await self._damage(job, paths)
            record = self._registry.get(job)
            if damage is not None and record.publishing and record.desired != transitions.DesiredState.CANCEL:
                self._registry.apply(transitions.train_again(record, damage))
            else:
                self._give_up(job, "adapter_failed", f"the adapter cannot be saved or read: {error}")
            return
        if refusal is not None:
            text = f"the adapter is trained and saved in {paths.adapter}, but cannot be served: {refusal}"
            self._give_up(job, "publication_failed", text)

    async def _damage(self, job: str, paths: JobPaths) -> str | None:
        """Why the job's last checkpoint cannot be used; None where it is whole."""
        try:
            await self._off(
                checkpoints.check_state, paths.checkpoints, self._registry.get(job).checkpoint_step
            )
        except CheckpointError as error:
            return str(error)
        return None

    def _wanted(self, job: str) -> bool:
        record = self._registry.get(job)
        lasts = record.status == JobStatus.SUCCEEDED and record.adapter_name not in record.deleted_models
        return (record.publishing or lasts) and not self._other_base(job)

    def _other_base(self, job: str) -> bool:
        """Whether the job's base is not served or not known; then the job waits for it."""
        other = not self._base_known or bool(self._registry.other_base(self._registry.get(job)))
        if other:
            self._waiting.add(job)
        return other

    # ---------------------------------------------------------------- files
    async def _save(self, job: str, paths: JobPaths) -> None:
        """Write the adapter's folder from the run's last checkpoint.  Raises CheckpointError: that
        is not whole; _PutOffError, _GivenUpError: the disk refuses."""
        record = self._registry.get(job)
        base = record.base.path if record.base is not None else self._model_path
        config = adapter_config(record.hyperparameters, base)
        step = record.checkpoint_step
        await self._again(
            job,
            lambda: self._off(checkpoints.save_adapter, paths.adapter, paths.checkpoints, step, config),
            "adapter_failed",
            lambda error: f"the adapter cannot be saved in {paths.adapter} ({error}): make room on the disk",
        )
        path = str(paths.adapter)
        saved = EventDraft("adapter_saved", f"adapter saved in {path}", data={"path": path})
        await self._registry.apply(transitions.Transition(self._registry.get(job), (saved,)))

    async def _share(self, job: str, paths: JobPaths) -> tuple[SharedBuffer, SlotRef, dict[str, Any]]:
        """The adapter's tensors in a slot; a missing or damaged folder is saved again, once.

        Raises CheckpointError: neither folder nor checkpoint is whole; _PutOffError, _GivenUpError:
        the disk or shared memory refuses.
        """
        fresh = not await self._off(paths.adapter.is_dir)
        if fresh:
            await self._save(job, paths)
        while True:
            try:
                return await self._again(
                    job,
                    lambda: self._off(checkpoints.load_adapter, paths.adapter, self._shm),
                    "shared_memory",
                    lambda error: shared_memory.refusal("the adapter", error),
                )
            except CheckpointError as error:
                if fresh:
                    raise
                text = f"{error}: the adapter is saved again from the run's last checkpoint"
                self._registry.apply(transitions.warn(self._registry.get(job), text))
            await self._save(job, paths)
            fresh = True

    async def _again(
        self,
        job: str,
        call: Callable[[], Awaitable[_T]],
        code: str,
        explain: Callable[[OSError | MemoryError], str],
    ) -> _T:
        """Try a write until it succeeds, with pauses, as long as the job's adapter is wanted.

        ``explain`` makes a sentence: what is wrong, what to do.  Raises _PutOffError at a first
        publication; _GivenUpError: a request for the adapter waits, or no write can succeed.
        """
        for wait_s in (*PAUSES_S, None):
            try:
                return await call()
            except (OSError, MemoryError) as error:
                text = explain(error)
                if self._registry.get(job).publishing and _passes(error):
                    raise _PutOffError(text) from error
                if wait_s is None or not self._wanted(job) or not _passes(error):
                    raise _GivenUpError(text, code=code) from error
                self._registry.apply(
                    transitions.warn(self._registry.get(job), f"{text}; trying again in {wait_s:g} s")
                )
            await asyncio.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

    # ---------------------------------------------------------------- the HTTP process
    async def _publish(self, job: str, paths: JobPaths) -> str | None:
        """Ask until there is an answer; None: served, or not wanted any more; else why not."""
        if self._wanted(job) and not await self._off(paths.adapter.is_dir):
            await self._save(job, paths)  # whether or not anybody is there to serve it
        refused = 0
        while True:
            await self._http.ready.wait()
            if not self._wanted(job):  # cancelled while it waited
                return None
            slot, ref, config = await self._share(job, paths)
            failpoint(Failpoint.TENSORS_SHARED)
            try:
                if not self._wanted(job):
                    return None
                answer = await self._ask(job, ref, config)
            finally:
                slot.unlink()
            if answer is None:  # lost on the way, or late: its number makes it nobody's answer
                continue
            if answer.ok:
                self._troubles.pop(job, None)
                if self._registry.get(job).publishing:
                    await self._end(job)
                return None
            if answer.passing and self._registry.get(job).publishing:
                raise _PutOffError(f"the adapter cannot be served now: {answer.text or answer.code}")
            refused += 1
            if refused == TRIES or not self._retry(job, answer.text):
                return answer.text or answer.code
            await asyncio.sleep(PAUSES_S[refused - 1])

    async def _end(self, job: str) -> None:
        """The job has succeeded, with the files of its results."""
        self.in_flight = job  # a cancel comes too late
        try:
            results = await self._results(job)
            now = time.time()  # stamp: when the job ended
            ended = self._registry.apply(transitions.published(self._registry.get(job), now, results))
        finally:
            self.in_flight = None
        await ended

    async def _ask(self, job: str, slot: SlotRef, config: dict[str, Any]) -> AdapterPublished | None:
        self.in_flight = job
        try:
            return await self._http.publish(
                job=job,
                name=self._registry.get(job).adapter_name,
                config=config,
                slot=slot,
                timeout_s=ANSWER_S,
            )
        finally:
            self.in_flight = None

    def _retry(self, job: str, text: str) -> bool:
        record = self._registry.get(job)
        if record.desired == transitions.DesiredState.CANCEL:
            return False
        self._registry.apply(transitions.warn(record, f"publication failed, trying again: {text}"))
        return True

    def _put_off(self, job: str, text: str) -> None:
        """Try again after a growing pause; a request that waits for the adapter is refused now."""
        record = self._registry.get(job)
        if not record.publishing:
            self._give_up(job, "adapter_failed", text)
            return
        count = self._troubles[job] = self._troubles.get(job, 0) + 1
        pause = trouble.pause_s(count)
        self._registry.apply(transitions.delayed(record, f"{text}; trying again in {pause:g} s"))
        asyncio.get_running_loop().call_later(pause, self.want, job)

    def _give_up(self, job: str, code: str, message: str) -> None:
        record = self._registry.get(job)
        self._troubles.pop(job, None)
        if record.publishing:
            now = time.time()  # stamp: when the job ended
            self._registry.apply(transitions.fail(record, code, message, now))
        elif record.status == JobStatus.SUCCEEDED:  # it stays so; requests for the adapter get the reason
            self._registry.apply(transitions.warn(record, message))
            self._http.refuse(record.adapter_name, code, message)


def _passes(error: OSError | MemoryError) -> bool:
    slot = isinstance(error, shared_memory.SharedBufferError)
    return shared_memory.passes(error) if slot else trouble.passes(error)

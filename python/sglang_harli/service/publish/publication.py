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
from sglang_harli.failpoints import Failpoint, FileFailpoint, failpoint
from sglang_harli.names import checkpoint_name
from sglang_harli.protocol import shared_memory, trouble
from sglang_harli.protocol.internal import AdapterPublished, SlotRef
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.jobs import evaluations, transitions
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.links.http_link import HttpLink
from sglang_harli.service.publish import checkpoint_list, exports
from sglang_harli.service.publish.adapter_names import Adapter, AdapterNames, is_deleted
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
        self._queue: asyncio.Queue[Adapter] = asyncio.Queue()
        self._queued: set[Adapter] = set()
        self.in_flight: str | None = None  # the job whose publication was asked for, until the answer
        self._base_known = False  # a hello of the scheduler has been read
        self._waiting: set[Adapter] = set()  # those whose base is not served
        self._troubles: dict[str, int] = {}  # in a row, of jobs that were put off
        self._names = names
        for record in registry.all():
            if record.status == JobStatus.RUNNING and record.publishing:
                self.want(record.id)

    def want(self, job: str, step: int | None = None) -> None:
        """Publish a job's adapter, or that of a checkpoint (``step``), now or again."""
        adapter = Adapter(job, step)
        if adapter not in self._queued:
            self._queued.add(adapter)
            self._queue.put_nowait(adapter)

    def want_name(self, name: str) -> None:
        """The HTTP process misses an adapter that it or an earlier server had, or a checkpoint's
        that was not asked for before."""
        adapter = self._names.find(name)
        if adapter is None:
            logger.warning("an unknown adapter was asked for: %s", name)
            self._http.refuse(name, "not_found", "no job of this run directory has made it")
            return
        record = self._registry.get(adapter.job)
        if is_deleted(record, adapter.step):
            self._http.refuse(name, "not_found", "it was deleted")
        elif other := self._registry.other_base(record):
            self._http.refuse(name, "other_base", other)
        else:
            self.want(*adapter)

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
        for adapter in waiting:
            self.want(*adapter)

    async def run(self) -> None:
        while True:
            adapter = await self._queue.get()
            self._queued.discard(adapter)
            try:
                await self._one(adapter)
            except Exception as error:  # boundary: one adapter is tried again later; the others come
                logger.exception("the adapter %s cannot be published", self._name(adapter))
                text = f"the adapter cannot be published ({type(error).__name__}: {error})"
                self._put_off(adapter, text)

    async def _one(self, adapter: Adapter) -> None:
        try:
            if self._other_base(adapter) or await self._is_gone(adapter):
                return
            refusal = await self._publish(adapter)
        except _GivenUpError as error:
            self._give_up(adapter, error.code, error.message)
            return
        except _PutOffError as error:
            self._put_off(adapter, error.message)
            return
        except CheckpointError as error:
            if await self._is_gone(adapter):  # meanwhile
                return
            damage = await self._damage(adapter) if self._first(adapter) else None
            record = self._registry.get(adapter.job)
            if damage is not None and record.publishing and record.desired != transitions.DesiredState.CANCEL:
                self._registry.apply(transitions.train_again(record, damage))
            else:
                self._give_up(adapter, "adapter_failed", f"the adapter cannot be saved or read: {error}")
            return
        if refusal is not None:
            text = f"the adapter is trained and saved in {self._folder(adapter)}, but cannot be served: {refusal}"
            self._give_up(adapter, "publication_failed", text)

    async def _is_gone(self, adapter: Adapter) -> bool:
        """Whether it is a checkpoint's that is not there (any more); who asks gets the reason."""
        if adapter.step is None:
            return False
        record, paths = self._registry.get(adapter.job), self._paths(adapter)
        steps = await self._off(checkpoint_list.there, record, paths)
        if adapter.step in steps:
            return False
        text = (
            f"job {record.id} has no checkpoint of step {adapter.step} (any more): there are those of steps "
            f"{', '.join(map(str, steps)) or 'none'}; the newest --harli-keep-checkpoints stay"
        )
        self._http.refuse(self._name(adapter), "not_found", text)
        record = self._registry.get(adapter.job)
        if adapter.step in record.served_steps:
            self._registry.apply(transitions.steps_left(record, steps), urgent=False)
        return True

    # ---------------------------------------------------------------- of one adapter
    def _name(self, adapter: Adapter) -> str:
        name = self._registry.get(adapter.job).adapter_name
        return name if adapter.step is None else checkpoint_name(name, adapter.step)

    def _paths(self, adapter: Adapter) -> JobPaths:
        return JobPaths(self._registry.run_dir, adapter.job)

    def _folder(self, adapter: Adapter) -> Path:
        """Of its files in PEFT's format."""
        paths = self._paths(adapter)
        return paths.adapter if adapter.step is None else exports.folder(paths, adapter.step)

    def _first(self, adapter: Adapter) -> bool:
        """Whether it is a job's first publication, with which the job ends."""
        return adapter.step is None and self._registry.get(adapter.job).publishing

    async def _damage(self, adapter: Adapter) -> str | None:
        """Why the job's last checkpoint cannot be used; None where it is whole."""
        step = self._registry.get(adapter.job).checkpoint_step
        try:
            await self._off(checkpoints.check_state, self._paths(adapter).checkpoints, step)
        except CheckpointError as error:
            return str(error)
        return None

    def _wanted(self, adapter: Adapter) -> bool:
        record = self._registry.get(adapter.job)
        lasts = adapter.step is not None or record.status == JobStatus.SUCCEEDED
        wanted = self._first(adapter) or (lasts and not is_deleted(record, adapter.step))
        return wanted and not self._other_base(adapter)

    def _other_base(self, adapter: Adapter) -> bool:
        """Whether the job's base is not served or not known; then the adapter waits for it."""
        record = self._registry.get(adapter.job)
        other = not self._base_known or bool(self._registry.other_base(record))
        if other:
            self._waiting.add(adapter)
        return other

    # ---------------------------------------------------------------- files
    async def _save(self, adapter: Adapter) -> None:
        """Write the adapter's folder from its checkpoint; that of a job's model from the run's last
        one, or from its best one where that is wanted and whole.  Raises CheckpointError: none is;
        _PutOffError, _GivenUpError: the disk refuses."""
        record = self._registry.get(adapter.job)
        *better, last = evaluations.to_publish(record) if adapter.step is None else [adapter.step]
        for step in better:
            try:
                await self._save_step(adapter, step)
                return
            except CheckpointError as error:
                text = f"the checkpoint of step {step} cannot be published ({error.message}): the next best one is"
                self._registry.apply(transitions.warn(self._registry.get(adapter.job), text))
        await self._save_step(adapter, last)

    async def _save_step(self, adapter: Adapter, step: int) -> None:
        record, paths, folder = (
            self._registry.get(adapter.job),
            self._paths(adapter),
            self._folder(adapter),
        )
        base = record.base.path if record.base is not None else self._model_path
        config = adapter_config(record.hyperparameters, base)
        await self._again(
            adapter,
            lambda: self._off(checkpoints.save_adapter, folder, paths.checkpoints, step, config),
            "adapter_failed",
            lambda error: f"the adapter cannot be saved in {folder} ({error}): make room on the disk",
        )
        if adapter.step is None:
            saved = transitions.adapter_saved(self._registry.get(adapter.job), str(folder), step)
            await self._registry.apply(saved)

    async def _share(self, adapter: Adapter) -> tuple[SharedBuffer, SlotRef, dict[str, Any]]:
        """The adapter's tensors in a slot; a missing or damaged folder is saved again, once.

        Raises CheckpointError: neither folder nor checkpoint is whole; _PutOffError, _GivenUpError:
        the disk or shared memory refuses.
        """
        folder = self._folder(adapter)
        fresh = not await self._off(folder.is_dir)
        if fresh:
            await self._save(adapter)
        while True:
            try:
                return await self._again(
                    adapter,
                    lambda: self._off(checkpoints.load_adapter, folder, self._shm),
                    "shared_memory",
                    lambda error: shared_memory.refusal("the adapter", error),
                )
            except CheckpointError as error:
                if fresh:
                    raise
                source = "the run's last checkpoint" if adapter.step is None else "its checkpoint"
                text = f"{error}: the adapter is saved again from {source}"
                self._registry.apply(transitions.warn(self._registry.get(adapter.job), text))
            await self._save(adapter)
            fresh = True

    async def _again(
        self,
        adapter: Adapter,
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
                if self._first(adapter) and _passes(error):
                    raise _PutOffError(text) from error
                if wait_s is None or not self._wanted(adapter) or not _passes(error):
                    raise _GivenUpError(text, code=code) from error
                self._registry.apply(
                    transitions.warn(self._registry.get(adapter.job), f"{text}; trying again in {wait_s:g} s")
                )
            await asyncio.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

    # ---------------------------------------------------------------- the HTTP process
    async def _publish(self, adapter: Adapter) -> str | None:
        """Ask until there is an answer; None: served, or not wanted any more; else why not."""
        if self._wanted(adapter) and not await self._off(self._folder(adapter).is_dir):
            await self._save(adapter)  # whether or not anybody is there to serve it
        refused = 0
        while True:
            await self._http.ready.wait()
            if not self._wanted(adapter):  # cancelled while it waited
                return None
            slot, ref, config = await self._share(adapter)
            failpoint(Failpoint.TENSORS_SHARED)
            try:
                if not self._wanted(adapter):
                    return None
                await self._note_served(adapter)
                answer = await self._ask(adapter, ref, config)
            finally:
                slot.unlink()
            if answer is None:  # lost on the way, or late: its number makes it nobody's answer
                continue
            if answer.ok:
                if self._first(adapter):
                    self._troubles.pop(adapter.job, None)
                    await self._end(adapter.job)
                return None
            if answer.passing and self._first(adapter):
                raise _PutOffError(f"the adapter cannot be served now: {answer.text or answer.code}")
            refused += 1
            if refused == TRIES or not self._retry(adapter, answer.text):
                return answer.text or answer.code
            await asyncio.sleep(PAUSES_S[refused - 1])

    async def _note_served(self, adapter: Adapter) -> None:
        """The store knows of a checkpoint's adapter before it answers: where another base is served
        it has to go."""
        record, step = self._registry.get(adapter.job), adapter.step
        if step is not None and step not in record.served_steps:
            await self._registry.apply(transitions.serve_step(record, step))
            failpoint(FileFailpoint.CHECKPOINT_NOTED)

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

    async def _ask(self, adapter: Adapter, slot: SlotRef, config: dict[str, Any]) -> AdapterPublished | None:
        self.in_flight = adapter.job if adapter.step is None else None
        try:
            return await self._http.publish(
                job=adapter.job,
                name=self._name(adapter),
                config=config,
                slot=slot,
                folder=str(self._folder(adapter).absolute()),
                timeout_s=ANSWER_S,
            )
        finally:
            self.in_flight = None

    def _retry(self, adapter: Adapter, text: str) -> bool:
        record = self._registry.get(adapter.job)
        if record.desired == transitions.DesiredState.CANCEL:
            return False
        self._registry.apply(transitions.warn(record, f"publication failed, trying again: {text}"))
        return True

    def _put_off(self, adapter: Adapter, text: str) -> None:
        """Try again after a growing pause; a request that waits for the adapter is refused now."""
        if not self._first(adapter):
            self._give_up(adapter, "adapter_failed", text)
            return
        job = adapter.job
        count = self._troubles[job] = self._troubles.get(job, 0) + 1
        pause = trouble.pause_s(count)
        record = self._registry.get(job)
        self._registry.apply(transitions.delayed(record, f"{text}; trying again in {pause:g} s"))
        asyncio.get_running_loop().call_later(pause, self.want, job)

    def _give_up(self, adapter: Adapter, code: str, message: str) -> None:
        record = self._registry.get(adapter.job)
        if self._first(adapter):
            self._troubles.pop(adapter.job, None)
            now = time.time()  # stamp: when the job ended
            self._registry.apply(transitions.fail(record, code, message, now))
        elif adapter.step is not None or record.status == JobStatus.SUCCEEDED:
            # The job stays as it is; requests for the adapter get the reason.
            self._registry.apply(transitions.warn(record, message))
            self._http.refuse(self._name(adapter), code, message)


def _passes(error: OSError | MemoryError) -> bool:
    slot = isinstance(error, shared_memory.SharedBufferError)
    return shared_memory.passes(error) if slot else trouble.passes(error)

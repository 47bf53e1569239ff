"""Carries out what the run machine decides: sockets, disk, shared memory, the store.

Messages, finished work, changed jobs and a tick a second go into ``RunMachine``; effects come out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.failpoints import Failpoint, ReadFailpoint, failpoint
from sglang_harli.names import short_id
from sglang_harli.protocol import internal, shared_memory, trouble
from sglang_harli.protocol.public import CODING_ERRORS
from sglang_harli.service.data.batches import Batch, BatchOrder
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.record import DesiredState
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import STORE_FILE
from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.pacing import Pace
from sglang_harli.service.publish.publication import PublicationQueue
from sglang_harli.service.run import state as machine
from sglang_harli.service.run.holds import NotNow
from sglang_harli.service.run.machine import RunMachine
from sglang_harli.service.run.prepare import UNREADABLE, NotHereError, prepare
from sglang_harli.service.run.snapshot_writer import SnapshotWriter
from sglang_harli.service.run.state import Effect, Now
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)

TICK_S = 1.0


class RunDriver:
    """Does what the run machine decides: prepares, feeds, stores, and speaks to the scheduler.  No
    job starts before ``tokenizer`` knows which one serves."""

    def __init__(
        self,
        registry: JobRegistry,
        publication: PublicationQueue,
        disk: Executor,
        shm: Path,
        tokenizer: ModelTokenizer,
        link: SchedulerLink,
    ) -> None:
        self._registry = registry
        self._publication = publication
        self._disk = disk
        self._shm = shm
        self._tokenizer = tokenizer
        self._link = link
        self._writer = SnapshotWriter(registry, disk)
        self._wake = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "feeder")  # rows in order, never behind a checkpoint
        self._hungry = asyncio.Event()
        self._ending = threading.Event()
        self._tasks: asyncio.TaskGroup | None = None
        # Slots of a service that was killed: a scheduler that still trains may hold one of them.
        self._stale = shared_memory.stale(shm)
        self._machine = RunMachine(registry)
        self._feeder: BatchOrder | None = None  # of the run in progress
        registry.listeners.append(lambda _record: self._wake.set())

    @property
    def active(self) -> bool:
        """Whether a run or a checkpoint is under way."""
        return self._machine.active

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._feed())
                while True:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), TICK_S if self._machine.waits else None)
                    self._wake.clear()
                    self._do(self._machine.tick(_now()))
                    if self._machine.run is not None or self._tokenizer.known:
                        self._do(self._machine.advance(_now()))
                    self._hungry.set()
        finally:
            self.stop()
            self._tasks = None

    def stop(self) -> None:
        """The service ends soon: making rows again is given up."""
        self._ending.set()

    def wake(self) -> None:
        """Something outside the jobs has changed."""
        self._wake.set()

    # ------------------------------------------------------------ the scheduler's messages
    def on_hello(self, hello: internal.Hello) -> None:
        without = self._registry.without_base() if hello.base is not None else []
        if without and hello.base is not None:
            names = ", ".join(short_id(record.id) for record in without)
            logger.info("jobs without a noted base now have %s: %s", hello.base.shown, names)
        self._do(self._machine.hello(hello, _now()))
        self._publication.base_known()

    def on_message(self, message: Any) -> None:
        self._do(self._machine.message(message, _now()))
        self._hungry.set()

    # ------------------------------------------------------------ effects
    def _do(self, effects: Sequence[Effect]) -> None:
        if self._tasks is None:  # the service ends: as if it had died, but for what the journal still writes
            return
        for effect in effects:
            self._do_one(effect)
        if effects:
            self._wake.set()

    def _do_one(self, effect: Effect) -> None:
        match effect:
            case machine.Apply(change, urgent, then):
                durable = self._registry.apply(change, urgent=urgent)
                if then:
                    durable.add_done_callback(lambda done: _refused(done) or self._do(then))
            case machine.Send(message):
                self._say(message)
            case machine.Acknowledge(seq):
                self._machine.acknowledged(seq)
                self._link.acknowledge(seq)
            case machine.HoldJob(job, reason, lasting):
                self._registry.hold(job, reason, lasting=lasting)
            case machine.ServeBase(base):
                self._registry.serve(base)
            case machine.AskHello():
                self._link.ask_hello()
            case machine.Prepare():
                self._spawn(self._prepare(effect))
            case machine.MakeSlot():
                self._spawn(self._make_slot(effect))
            case machine.SaveSnapshot(message):
                self._spawn(self._save(message))
            case machine.Saved(job):
                failpoint(Failpoint.STORE_COMMITTED)
                self._spawn(self._writer.prune(job))
            case machine.Publish(job):
                self._publication.want(job)
            case machine.TakeBack(path):
                _remove(path)
            case machine.RemoveStale():
                for path in self._stale:
                    _remove(path)
                self._stale = []

    async def _prepare(self, asked: machine.Prepare) -> None:
        job, attempt = asked.job, asked.attempt
        try:
            found = await self._off(
                prepare,
                self._registry.get(job),
                JobPaths(self._registry.run_dir, job),
                asked.limits,
                self._tokenizer,
                self._shm if asked.restore else None,
                lambda: self._is_unwanted(job),
            )
        except NotHereError as error:
            effects = self._machine.put_off(job, attempt, NotNow(error.message, passing=False), _now())
        except NotReadyError as error:
            effects = self._machine.put_off(job, attempt, NotNow(error.message), _now())
        except HarliError as error:
            effects = self._machine.not_prepared(job, attempt, error.code, error.message, _now(), error.param)
        except Exception as error:  # boundary: one job fails; the service goes on
            effects = self._cannot_prepare(job, attempt, error)
        else:
            effects = self._machine.prepared(job, attempt, found, _now())
        self._do(effects)

    def _cannot_prepare(self, job: str, attempt: int, error: Exception) -> Sequence[Effect]:
        text = f"the job cannot be prepared ({type(error).__name__}: {error})"
        if self._passes(error):
            return self._machine.put_off(job, attempt, NotNow(text), _now())
        logger.error("job %s cannot be prepared", job, exc_info=error)
        code = "bad_data_files" if isinstance(error, UNREADABLE) else "internal"
        return self._machine.not_prepared(job, attempt, code, f"{text}: submit it again", _now())

    def _passes(self, error: Exception) -> bool:
        """Whether it is trouble of the environment, such as a run directory that is away."""
        return trouble.passes(error) or not (self._registry.run_dir / STORE_FILE).exists()

    def _is_unwanted(self, job: str) -> bool:
        """Whether a run that is being prepared is to stop; asked by a thread."""
        record = self._registry.find(job)
        return self._ending.is_set() or record is None or record.desired != DesiredState.RUN

    async def _make_slot(self, asked: machine.MakeSlot) -> None:
        try:
            ref = await self._off(_make_slot, self._shm, asked.nbytes)
        except (OSError, MemoryError) as error:
            text = shared_memory.refusal(f"the {asked.nbytes} bytes of a checkpoint", error)
            if shared_memory.passes(error):
                effects = self._machine.put_off(asked.job, asked.attempt, NotNow(text), _now())
            else:
                effects = self._machine.slot_refused(asked.job, asked.attempt, text, _now())
        else:
            effects = self._machine.slot_made(asked.job, asked.attempt, ref)
        self._do(effects)

    async def _save(self, message: internal.SnapshotReady) -> None:
        def waits(text: str) -> None:
            self._do(self._machine.snapshot_delayed(message, text))

        found = await self._writer.write(message, waits)
        self._do(self._machine.snapshot_written(message, found, _now()))

    # ------------------------------------------------------------ feeding
    async def _feed(self) -> None:
        """Its own task: a disk that hangs delays the run's data, and no answers."""
        while True:
            await self._hungry.wait()
            self._hungry.clear()
            while await self._feed_one():
                pass
            self._close_files()

    async def _feed_one(self) -> bool:
        """Whether there may be another micro-batch to send."""
        cursor, run = self._machine.next_batch(), self._machine.run
        if cursor is None or run is None:
            return False
        assert isinstance(run.plan, BatchOrder)
        try:
            batch = await asyncio.get_running_loop().run_in_executor(self._reader, _read, run.plan, cursor)
        except UNREADABLE as error:
            if self._machine.run is run:
                self._do(self._cannot_read(run, cursor, error))
            return False
        if self._machine.run is not run or self._machine.next_batch() != cursor:
            return True  # it stopped, or goes on from somewhere else, since
        message = internal.MicroBatch(
            job=run.job,
            attempt=run.attempt,
            cursor=cursor,
            micro_batches=batch.micro_batches,
            lengths=batch.data.lengths,
            rows=batch.data.positions,
            step_target_tokens=batch.step_target_tokens,
            evaluation=batch.evaluation,
        )
        if not self._link.send(message, *(array.data for array in batch.data.arrays)):
            return False  # nobody is there: tried again at the next tick
        failpoint(Failpoint.MICRO_BATCH_FED)
        self._machine.fed(cursor, batch.data.nbytes)
        return True

    def _cannot_read(
        self, run: machine.Run, cursor: internal.BatchCursor, error: Exception
    ) -> Sequence[Effect]:
        if self._passes(error):
            why = NotNow(f"the job's data cannot be read now ({error})")
            return self._machine.put_off(run.job, run.attempt, why, _now())
        return self._machine.data_failed(cursor, str(error), _now())

    def _close_files(self) -> None:
        """Close the data of a run that is over."""
        plan = self._machine.run.plan if self._machine.run is not None else None
        if self._feeder is not None and self._feeder is not plan:
            self._feeder.close()
        self._feeder = plan if isinstance(plan, BatchOrder) else None

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ short hands
    def _say(self, message: internal.Message) -> None:
        try:
            self._link.send(message)
        except CODING_ERRORS as error:
            if not isinstance(message, internal.StartRun):
                raise
            text = f"its run cannot be described to the scheduler ({type(error).__name__}: {error}): submit it again"
            self._do(self._machine.cannot_start(message.spec.job, message.spec.attempt, text, _now()))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        assert self._tasks is not None, "effects are done while run() runs"
        self._tasks.create_task(work)

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)


def _refused(durable: asyncio.Future[None]) -> bool:
    """Whether a change never becomes durable (the journal has said why)."""
    return durable.cancelled() or durable.exception() is not None


def _remove(path: str | Path) -> None:
    """A file in shared memory; one that stays is removed at the next start."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)


def _read(plan: BatchOrder, cursor: internal.BatchCursor) -> Batch:
    failpoint(ReadFailpoint.ROWS)
    return plan.batch(cursor)


def _make_slot(folder: Path, nbytes: int) -> internal.SlotRef:
    slot = shared_memory.SharedBuffer.create(folder, nbytes, Pace().rest)
    slot.close()  # the file stays: the scheduler maps it by its name
    return slot.ref()


def _now() -> Now:
    return Now(time.time(), time.monotonic())  # stamp: when a job began or ended

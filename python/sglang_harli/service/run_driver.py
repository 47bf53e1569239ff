"""Drives the one run in progress: takes the next job, starts it, feeds it, stops it, and sees it end.

The scheduler is right about work applied; the store is right about what is wanted.  Messages only change
what is known here and wake ``run``, which is the one place that acts on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from sglang_harli.core import JobStatus, SubState
from sglang_harli.errors import HarliError
from sglang_harli.fault_points import Point, reach
from sglang_harli.protocol import internal, shared_memory
from sglang_harli.service import jobs
from sglang_harli.service.desk import JobDesk
from sglang_harli.service.job_files import JobPaths
from sglang_harli.service.jobs import JobRecord, Wish
from sglang_harli.service.publication import Publication
from sglang_harli.service.run_in_progress import (
    STEPS_AHEAD,
    Phase,
    Restored,
    Run,
    open_feeder,
    restore,
    start_message,
)
from sglang_harli.service.scheduler_link import SchedulerLink
from sglang_harli.service.snapshot_writer import SnapshotWriter

logger = logging.getLogger(__name__)

SUB_STATE_EVENT_S = 10.0  # a sub-state that changes faster is shown in the job, not told as events
MAX_BACKLOG = 20_000  # events: beyond that (the disk is full) steps are counted but not told


class RunDriver:
    """Args:
    desk, publication: the jobs, and where a trained one goes.
    disk: where blocking work runs.
    shm: folder of slots.
    fingerprint: of the tokenizer (blocking; loads it).
    """

    def __init__(
        self,
        desk: JobDesk,
        publication: Publication,
        disk: Executor,
        shm: Path,
        fingerprint: Callable[[], str],
    ) -> None:
        self._desk = desk
        self._publication = publication
        self._disk = disk
        self._shm = shm
        self._fingerprint = fingerprint
        self._link: SchedulerLink | None = None
        self._writer = SnapshotWriter(desk, disk, self._send)
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        # Slots of a service that was killed: a scheduler that still trains may hold one of them.
        self._stale = sorted(shm.glob("slot-*"))
        self._run: Run | None = None
        self._greeted = False
        desk.listeners.append(lambda _record: self._wake.set())

    def attach(self, link: SchedulerLink) -> None:
        self._link = link

    @property
    def active(self) -> bool:
        """Whether a run or a checkpoint is under way."""
        return self._run is not None or self._writer.busy

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._advance()

    # ------------------------------------------------------------ acting
    async def _advance(self) -> None:
        run = self._run
        if run is None:
            record = self._desk.next_queued() if self._greeted and self._limits() else None
            if record is not None:
                self._begin(record)
            return
        record = self._desk.find(run.job)
        if record is None or run.phase in (Phase.PREPARING, Phase.STOPPING):
            return
        if record.wish not in (Wish.RUN, run.asked):
            stop = internal.StopRun(job=run.job, attempt=run.attempt, snapshot=record.wish == Wish.PAUSE)
            if self._send(stop):
                run.asked = record.wish
        elif run.phase == Phase.TRAINING and run.asked == Wish.RUN:
            await self._feed(run)

    def _begin(self, record: JobRecord) -> None:
        if record.checkpoint_step == record.total_steps:  # all that is left is the publication
            self._desk.apply(jobs.trained(jobs.start(record, time.time()).record))
            self._publication.want(record.id)
            self._wake.set()
            return
        change = jobs.start(record, time.time())
        run = Run(record.id, change.record.attempt, Phase.PREPARING, self._scheduler_pid())
        self._run = run
        self._spawn(self._start(run, self._desk.apply(change)))

    async def _start(self, run: Run, durable: asyncio.Future[None]) -> None:
        await durable  # the attempt's number, before the scheduler hears of it
        record = self._desk.get(run.job)
        paths = JobPaths(self._desk.run_dir, run.job)
        restored = Restored()
        try:
            limits = self._limits()
            assert limits is not None
            fingerprint = await self._off(self._fingerprint)
            run.feeder = feeder = await self._off(open_feeder, record, paths, limits, fingerprint)
            restored = await self._off(restore, record, paths, self._shm)
        except HarliError as error:
            self._desk.apply(
                jobs.fail(self._desk.get(run.job), error.code, error.message, time.time(), error.param)
            )
            self._end(run)
            return
        run.restore = restored.slot
        for text in restored.warnings:
            self._desk.apply(jobs.warn(self._desk.get(run.job), text))
        run.applied, run.tokens = restored.step, restored.tokens
        run.next_cursor = feeder.cursor_after(restored.step)
        self._send_start(run, restored)

    def _send_start(self, run: Run, restored: Restored) -> None:
        record = self._desk.get(run.job)
        if record.wish != Wish.RUN:  # paused or cancelled while it was prepared
            self._desk.apply(jobs.stopped(record, time.time()))
            self._end(run)
        elif self._send(start_message(record, restored)):
            run.phase, run.scheduler_pid = Phase.STARTING, self._scheduler_pid()
            self._wake.set()
        else:
            self._greeted = False  # nothing is started before its next hello
            self._lost(run, "the scheduler is away")

    async def _feed(self, run: Run) -> None:
        """Feed up to STEPS_AHEAD optimizer steps beyond the last one applied."""
        feeder = run.feeder
        assert feeder is not None
        fed = 0
        while self._run is run and run.next_cursor is not None:
            cursor = run.next_cursor
            if cursor.step > min(run.applied + STEPS_AHEAD, feeder.total_steps):
                return
            batch = feeder.batch(cursor)
            message = internal.MicroBatch(
                job=run.job,
                attempt=run.attempt,
                cursor=cursor,
                micro_batches=batch.micro_batches,
                lengths=batch.lengths,
                rows=batch.rows,
                step_target_tokens=batch.step_target_tokens,
            )
            if not self._send(message, batch.input_ids.data, batch.labels.data):
                return
            reach(Point.MICRO_BATCH_FED)
            run.next_cursor = feeder.following(cursor)
            fed += 1
            if fed % 16 == 0:  # a step may have thousands of them
                await asyncio.sleep(0)
                if run.asked != Wish.RUN or self._desk.get(run.job).wish != Wish.RUN:
                    self._wake.set()
                    return

    # ------------------------------------------------------------ hello
    def on_hello(self, hello: internal.Hello) -> None:
        """Compare the scheduler's run with ours: adopt it, stop it, or start ours again."""
        run, first = self._run, not self._greeted
        self._greeted = True
        if hello.job is None:
            gone = run is not None and (
                run.phase in (Phase.TRAINING, Phase.STOPPING) or run.scheduler_pid != hello.pid
            )
            if run is not None and gone and run.phase != Phase.PREPARING:
                self._lost(run, "the scheduler was restarted")
        elif run is None:
            self._meet(hello)
        elif not run.names(hello):
            self._send(internal.StopRun(job=hello.job, attempt=hello.attempt, snapshot=False))
        if first and self._run is None:
            self._remove_stale()
        self._wake.set()

    def _meet(self, hello: internal.Hello) -> None:
        """The scheduler holds a run that this process did not start."""
        assert hello.job is not None
        record = self._desk.find(hello.job)
        if record is not None and record.attempt != hello.attempt:
            record = None  # an older attempt: nothing of it is wanted
        if record is not None and record.publishing:
            saved = internal.SnapshotSaved(job=record.id, attempt=record.attempt, step=record.total_steps)
            self._send(saved)  # whoever wrote it died before saying so
            return
        run = Run(hello.job, hello.attempt, Phase.PREPARING, hello.pid, applied=hello.step)
        self._run = run
        if record is not None and record.status == JobStatus.QUEUED and hello.limits is not None:
            run.tokens = record.trained_tokens
            self._desk.apply(jobs.adopt(record, hello.step))
            self._spawn(self._adopt(run, hello))
            return
        run.phase = Phase.STOPPING
        keep = record is not None and record.status in (JobStatus.QUEUED, JobStatus.PAUSED)
        self._send(internal.StopRun(job=hello.job, attempt=hello.attempt, snapshot=keep))

    async def _adopt(self, run: Run, hello: internal.Hello) -> None:
        record = self._desk.get(run.job)
        paths = JobPaths(self._desk.run_dir, run.job)
        assert hello.limits is not None
        try:
            fingerprint = await self._off(self._fingerprint)
            run.feeder = feeder = await self._off(open_feeder, record, paths, hello.limits, fingerprint)
        except HarliError as error:
            self._desk.apply(jobs.fail(self._desk.get(run.job), error.code, error.message, time.time()))
            self._send(internal.StopRun(job=run.job, attempt=run.attempt, snapshot=False))
            run.phase = Phase.STOPPING
            return
        run.next_cursor = hello.next_cursor or feeder.cursor_after(hello.step)
        run.phase = Phase.TRAINING
        self._wake.set()

    # ------------------------------------------------------------ the run's messages
    def on_message(self, message: Any) -> asyncio.Future[Any] | None:
        """Take a message of the scheduler; the future is done when it is taken over durably."""
        run = self._run if self._run is not None and self._run.names(message) else None
        if isinstance(message, internal.SnapshotReady):
            return self._spawn(self._snapshot(message))
        if isinstance(message, internal.StepDone):
            return self._step_done(run, message)
        if run is None:
            return None
        if isinstance(message, internal.RunStarted):
            return self._spawn(self._started(run, message))
        if isinstance(message, internal.Progress):
            self._progress(run, message)
            return None
        return self._over(run, message)

    async def _started(self, run: Run, message: internal.RunStarted) -> None:
        run.drop_restore()
        if run.phase == Phase.STARTING:
            run.phase = Phase.TRAINING
            self._wake.set()
        if run.slot is None:
            try:
                slot = await self._off(shared_memory.Slot.create, self._shm, message.state_bytes)
            except OSError as error:
                text = (
                    f"shared memory has no room for the {message.state_bytes} bytes of a checkpoint ({error})"
                )
                self._desk.apply(
                    jobs.fail(
                        self._desk.get(run.job),
                        "shared_memory",
                        f"{text}: make room in /dev/shm",
                        time.time(),
                    )
                )
                self._send(internal.StopRun(job=run.job, attempt=run.attempt, snapshot=False))
                run.phase = Phase.STOPPING
                return
            run.slot = ref = slot.ref()
            slot.close()
        else:
            ref = run.slot
        self._send(internal.SnapshotSlot(job=run.job, attempt=run.attempt, slot=ref))

    def _step_done(self, run: Run | None, message: internal.StepDone) -> asyncio.Future[Any] | None:
        record = self._desk.find(message.job)
        if record is None or record.status != JobStatus.RUNNING or record.attempt != message.attempt:
            return None
        if run is not None:
            run.applied = max(run.applied, message.step)
        self._wake.set()
        if (message.attempt, message.step) <= (record.metrics_attempt, record.metrics_step):
            return None  # sent again after a restart of this service
        if run is not None:
            run.tokens += message.tokens
        metrics = {
            name: getattr(message, name)
            for name in (
                *("step", "epoch", "loss", "learning_rate", "grad_norm"),
                *("tokens", "target_tokens", "seconds", "attempt"),
            )
        }
        tokens = run.tokens if run is not None else record.trained_tokens + message.tokens
        change = jobs.step_done(record, message.step, tokens, metrics)
        if self._desk.journal.backlog > MAX_BACKLOG:
            change = jobs.Change(change.record)
        return self._desk.apply(change, urgent=False)

    def _progress(self, run: Run, message: internal.Progress) -> None:
        run.applied = max(run.applied, message.step)
        record = self._desk.get(run.job)
        if record.status != JobStatus.RUNNING or record.publishing:
            return
        try:
            sub_state = SubState(message.sub_state)
        except ValueError:
            logger.error("the scheduler reports an unknown sub-state %r", message.sub_state)
            return
        reason = message.reason if record.wish == Wish.RUN else record.reason
        change = jobs.progress(record, message.step, message.tokens, sub_state, reason)
        now = time.monotonic()
        if run.told_sub_state != sub_state and now - run.told_at >= SUB_STATE_EVENT_S:
            run.told_sub_state, run.told_at = sub_state, now
            change = jobs.sub_state_event(change.record)
        self._desk.apply(change, urgent=False)

    async def _snapshot(self, message: internal.SnapshotReady) -> None:
        run = self._run if self._run is not None and self._run.names(message) else None
        saved = await self._writer.save(message, run.tokens if run else 0)
        record = self._desk.find(message.job)
        if message.reason == "shutdown":  # the server ends: nothing is started before another hello
            self._greeted = False
        if message.reason != "final" or record is None:
            return
        if record.attempt == message.attempt and not record.status.final:
            if record.publishing:
                self._publication.want(record.id)
            elif record.wish == Wish.CANCEL:
                await self._desk.apply(jobs.stopped(record, time.time()))
            elif not saved:
                text = "the last checkpoint cannot be written (see the warnings before): make room, then submit again"
                await self._desk.apply(jobs.fail(record, "checkpoint_failed", text, time.time()))
                self._send(internal.StopRun(job=message.job, attempt=message.attempt, snapshot=False))
        if run is not None:
            self._end(run)

    def _over(self, run: Run, message: Any) -> asyncio.Future[Any] | None:
        """RunStopped or RunFailed."""
        record = self._desk.find(run.job)
        self._end(run)
        if record is None or record.status != JobStatus.RUNNING or record.publishing:
            return None
        if isinstance(message, internal.RunFailed):
            return self._desk.apply(jobs.fail(record, message.code, message.message, time.time()))
        return self._desk.apply(jobs.stopped(record, time.time()))

    # ------------------------------------------------------------ ends
    def _lost(self, run: Run, why: str) -> None:
        """The scheduler does not hold the run any more."""
        record = self._desk.find(run.job)
        if record is not None and record.status == JobStatus.RUNNING and not record.publishing:
            self._desk.apply(jobs.interrupted(record, why))
        self._end(run)

    def _end(self, run: Run) -> None:
        run.take_back()
        if self._run is run:
            self._run = None
        self._remove_stale()
        self._wake.set()

    def _remove_stale(self) -> None:
        for path in self._stale:
            path.unlink(missing_ok=True)
        self._stale = []

    # ------------------------------------------------------------ short hands
    def _limits(self) -> internal.ServedLimits | None:
        return self._link.limits if self._link else None

    def _scheduler_pid(self) -> int:
        return self._link.hello.pid if self._link and self._link.hello else 0

    def _send(self, message: internal.Message, *frames: Any) -> bool:
        return self._link is not None and self._link.send(message, *frames)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        assert self._tasks is not None, "messages come while run() runs"
        return self._tasks.create_task(work)

    async def _off(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call, *args)

"""All jobs of this run directory, in memory, and the one way to change them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError, NotFoundError, NotReadyError
from sglang_harli.names import short_id
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.public import Event, Job, Slo
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.folder import JobMirror, JobPaths
from sglang_harli.service.jobs.journal import Journal
from sglang_harli.service.jobs.queue_order import QueueOrder
from sglang_harli.service.jobs.served_base import ServedBase
from sglang_harli.service.jobs.store import JobStore
from sglang_harli.service.jobs.transitions import JobRecord, Transition

logger = logging.getLogger(__name__)

DURABLE_S = 30.0  # a command waits so long for a store that cannot be written


class JobRegistry:
    """Loads the store, re-queues what a crash left running, and keeps the records.

    ``why_none_starts`` (why no queued job can start now, or None) gets what the job itself waits
    for (``QueueOrder.lasting``) and why the store cannot be written.
    ``slo``: the latency targets in force.
    """

    def __init__(
        self,
        store: JobStore,
        run_dir: Path,
        keep_checkpoints: int = 2,
        why_none_starts: Callable[[str, str | None], str | None] = lambda _own, _trouble: None,
        slo: Callable[[], Slo | None] = lambda: None,
    ) -> None:
        self.run_dir = run_dir
        self.store = store
        self.keep_checkpoints = keep_checkpoints
        self._why_none_starts = why_none_starts
        self._slo = slo
        self._records: dict[str, JobRecord] = {}  # in the order of their numbers
        self._keys: dict[str, str] = {}
        self._short_ids: set[str] = set()
        self._counts: Counter[JobStatus] = Counter()
        self._served = ServedBase()
        self._queue = QueueOrder(self._served.other)
        self._number = 0
        for record in store.jobs():
            self._keep(record)
        self.unreadable = {found.id: found for found in store.unreadable}
        for found in store.unreadable:  # its number, short id and key stay its own
            self._number = max(self._number, found.number)
            self._short_ids.add(short_id(found.id))
        self.listeners: list[Callable[[JobRecord], None]] = []  # after each change, before it is durable
        self.committed: list[Callable[[set[str]], None]] = []  # with the jobs whose changes are durable
        self.journal = Journal(
            store,
            JobMirror(run_dir, store.events),
            self._shown,
            asyncio.get_running_loop(),
            self._committed,
        )
        self._waiters: dict[str, asyncio.Event] = {}
        self._before_end: dict[str, tuple[JobRecord, asyncio.Future[None]]] = {}  # whose end is being written
        self.journal.check(self._records.values())
        for record in list(self._records.values()):
            if record.status == JobStatus.RUNNING and not record.publishing:
                now = time.time()  # stamp: when a job that was to be cancelled ended
                self.apply(transitions.interrupted(record, "the service was restarted", now))

    def _committed(self, ids: set[str]) -> None:
        for call in self.committed:
            call(ids)

    # ---- reading
    def get(self, job: str) -> JobRecord:
        """Raises NotFoundError."""
        record = self._records.get(job)
        if record is None and job in self.unreadable:
            raise HarliError(
                f"the record of job {job} in the job store cannot be read ({self.unreadable[job].why}): its folder "
                f"{JobPaths(self.run_dir, job).folder} stays as it is",
                code="unreadable",
                param="job",
            )
        if record is None:
            raise NotFoundError(
                f"there is no job {job!r}: `harli list`, or GET /v1/fine_tuning/jobs, shows the jobs of this server",
                param="job",
            )
        return record

    def find(self, job: str) -> JobRecord | None:
        return self._records.get(job)

    def by_key(self, key: str) -> JobRecord | None:
        """The job of an idempotency key; raises HarliError where its record cannot be read."""
        for found in self.unreadable.values():
            if found.idempotency_key == key:
                self.get(found.id)
        job = self._keys.get(key)
        return self._records[job] if job else None

    def all(self) -> list[JobRecord]:
        """In the order of their creation."""
        return list(self._records.values())

    def newest(self) -> Iterator[JobRecord]:
        """From the last one created back to the first; not to be held across an await."""
        return reversed(self._records.values())

    def counts(self) -> dict[str, int]:
        return {str(status): self._counts[status] for status in JobStatus}

    def next_queued(self) -> JobRecord | None:
        """The queued job of the highest priority, the oldest of these."""
        job = self._queue.first()
        return None if job is None else self._records[job]

    def hold(self, job: str, reason: str, *, lasting: bool = False) -> None:
        """See ``QueueOrder.hold``."""
        self._queue.hold(job, reason, lasting=lasting)

    def serve(self, base: BasePrint | None) -> None:
        """This base is served from now on, None: which one is not known; jobs of others wait."""
        self._served.serve(base)
        for record in self._records.values():
            self._queue.update(record)

    def without_base(self) -> list[JobRecord]:
        """Jobs whose base is not recorded."""
        return [record for record in self._records.values() if record.base is None]

    def other_base(self, record: JobRecord) -> str:
        """Why the job's base is not the one that is served, "" where it is."""
        return self._served.other(record)

    def public(self, record: JobRecord) -> Job:
        """The job as clients see it, a queued one with the reason it waits.  It is not over before
        that is durable: a crash would take it back."""
        job = self._shown(self._before_end[record.id][0] if record.id in self._before_end else record)
        if record.status == JobStatus.QUEUED:
            waits = self._why_none_starts(self._queue.lasting(record.id), self.journal.trouble)
            job.reason = waits or self._queue.reason(record.id)
        elif record.publishing:
            job.reason = self._served.other(record) or job.reason
        job.slo = self._slo() if job.finished_at is None else None
        return job

    def _shown(self, record: JobRecord) -> Job:
        return transitions.public(record, str(JobPaths(self.run_dir, record.id).folder))

    # ---- changing
    def new_id(self) -> str:
        """A job id whose short form no other job has (adapter names carry it)."""
        while True:
            job = f"ftjob-{secrets.token_hex(12)}"
            if short_id(job) not in self._short_ids:
                return job

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def add(self, change: Transition) -> asyncio.Future[None]:
        """A new job; durable when the future is done.  One that the store refuses is none."""
        future = self.apply(change)
        future.add_done_callback(
            lambda done: done.cancelled() or done.exception() is None or self._forget(change.record.id)
        )
        return future

    def apply(self, change: Transition, *, urgent: bool = True) -> asyncio.Future[None]:
        """Take a transition over: memory now, store soon; durable when the future is done."""
        record = change.record
        events = []
        for draft in change.drafts:
            record = msgspec.structs.replace(record, last_event=record.last_event + 1)
            events.append(
                Event(
                    id=record.last_event,
                    job=record.id,
                    created_at=time.time(),  # stamp: of an event
                    level=draft.level,
                    type=draft.type,
                    message=draft.message,
                    data=draft.data,
                )
            )
            if draft.type != "step_metrics":
                logger.info("job %s: %s: %s", record.id, draft.type, draft.message)
        old = self._records.get(record.id)
        self._keep(record)
        future = self.journal.put(record, events, urgent=urgent)
        if record.status.final and old is not None and not old.status.final:
            self._before_end[record.id] = old, future
            future.add_done_callback(lambda _: self._before_end.pop(record.id, None))
        for listener in self.listeners:
            listener(record)
        waiter = self._waiters.pop(record.id, None)
        if waiter is not None:
            waiter.set()
        return future

    def _keep(self, record: JobRecord) -> None:
        """The record and its indexes: constant work per change, however many jobs there are."""
        record = self._served.shared(record)
        old = self._records.get(record.id)
        if old is not None:
            self._counts[old.status] -= 1
        else:
            self._number = max(self._number, record.number)
            self._short_ids.add(short_id(record.id))
            if record.idempotency_key:
                self._keys[record.idempotency_key] = record.id
        self._records[record.id] = record
        self._counts[record.status] += 1
        self._queue.update(record)

    def _forget(self, job: str) -> None:
        record = self._records.pop(job)
        self._counts[record.status] -= 1
        if record.idempotency_key:
            self._keys.pop(record.idempotency_key, None)
        self._queue.update(msgspec.structs.replace(record, status=JobStatus.CANCELLED))

    async def durable(self, future: asyncio.Future[None] | None = None) -> None:
        """Wait for a change (None: all changes so far) to be durable.  NotReadyError: not within
        DURABLE_S, later perhaps; UnwritableError: never."""
        future = future or self.journal.put()
        done, _ = await asyncio.wait({future}, timeout=DURABLE_S)
        if done:
            future.result()  # raises what the store refuses
        else:
            raise NotReadyError(
                f"{self.journal.trouble or 'the job store is slow'}: what was asked takes effect when it can be "
                "written; ask again to be sure"
            )

    async def wait_until(self, job: str, done: Callable[[JobRecord], bool], timeout_s: float) -> JobRecord:
        """The record once ``done`` holds (an end of the job: durably), or after ``timeout_s``.
        Raises as ``durable``."""
        record = await self.wait_in_memory(job, done, timeout_s)
        if job not in self._before_end:
            return record
        await self.durable(self._before_end[job][1])
        return self.get(job)

    async def wait_in_memory(
        self, job: str, done: Callable[[JobRecord], bool], timeout_s: float
    ) -> JobRecord:
        """The same without durability: a store that cannot be written is not waited for."""
        end = time.monotonic() + timeout_s
        while not done(self.get(job)):
            left = end - time.monotonic()
            if left <= 0:
                break
            waiter = self._waiters.setdefault(job, asyncio.Event())
            try:
                await asyncio.wait_for(waiter.wait(), left)
            except TimeoutError:
                break
        return self.get(job)

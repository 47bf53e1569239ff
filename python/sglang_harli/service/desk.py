"""All jobs of this run directory, in memory, and the one way to change them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from sglang_harli.core import JobStatus, short_id
from sglang_harli.errors import NotFoundError
from sglang_harli.protocol.public import Event, Job
from sglang_harli.service import jobs
from sglang_harli.service.job_files import JobMirror, JobPaths
from sglang_harli.service.job_store import JobStore
from sglang_harli.service.jobs import Change, JobRecord
from sglang_harli.service.journal import Journal

logger = logging.getLogger(__name__)


class JobDesk:
    """Loads the store, re-queues what a crash left running, and keeps the records.

    Attributes:
        journal: the writer behind it.
        listeners: called with a record after each change (on the loop, before it is durable).
        committed: called with the ids of jobs whose changes have become durable.
    """

    def __init__(self, store: JobStore, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.store = store
        self._records = {record.id: record for record in store.jobs()}
        self._keys = {r.idempotency_key: r.id for r in self._records.values() if r.idempotency_key}
        self._number = max((r.number for r in self._records.values()), default=0)
        self.listeners: list[Callable[[JobRecord], None]] = []
        self.committed: list[Callable[[set[str]], None]] = []
        self.journal = Journal(
            store,
            JobMirror(run_dir, store.events),
            self.public,
            asyncio.get_running_loop(),
            self._committed,
        )
        self._waiters: dict[str, asyncio.Event] = {}
        for record in list(self._records.values()):
            if record.status == JobStatus.RUNNING and not record.publishing:
                self.apply(jobs.interrupted(record, "the service was restarted"))

    def _committed(self, jobs: set[str]) -> None:
        for call in self.committed:
            call(jobs)

    # ---- reading
    def get(self, job: str) -> JobRecord:
        """Raises NotFoundError."""
        record = self._records.get(job)
        if record is None:
            raise NotFoundError(
                f"there is no job {job!r}: `harli list` shows the jobs of this server", param="job"
            )
        return record

    def find(self, job: str) -> JobRecord | None:
        return self._records.get(job)

    def by_key(self, key: str) -> JobRecord | None:
        job = self._keys.get(key)
        return self._records[job] if job else None

    def all(self) -> list[JobRecord]:
        return list(self._records.values())

    def counts(self) -> dict[str, int]:
        found = Counter(str(r.status) for r in self._records.values())
        return {str(status): found[str(status)] for status in JobStatus}

    def next_queued(self) -> JobRecord | None:
        """The oldest queued job: a resumed one comes back to its old place."""
        queued = (r for r in self._records.values() if r.status == JobStatus.QUEUED)
        return min(queued, key=lambda r: r.number, default=None)

    def public(self, record: JobRecord) -> Job:
        return jobs.public(record, str(JobPaths(self.run_dir, record.id).folder))

    # ---- changing
    def new_id(self) -> str:
        """A job id whose short form no other job has (adapter names carry it)."""
        taken = {short_id(job) for job in self._records}
        while True:
            job = f"ftjob-{secrets.token_hex(12)}"
            if short_id(job) not in taken:
                return job

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def add(self, change: Change) -> asyncio.Future[None]:
        """A new job; durable when the future is done."""
        if change.record.idempotency_key:
            self._keys[change.record.idempotency_key] = change.record.id
        return self.apply(change)

    def apply(self, change: Change, *, urgent: bool = True) -> asyncio.Future[None]:
        """Take a transition over: memory now, store soon; durable when the future is done."""
        record = change.record
        events = []
        for draft in change.drafts:
            record = msgspec.structs.replace(record, last_event=record.last_event + 1)
            events.append(
                Event(
                    id=record.last_event,
                    job=record.id,
                    created_at=time.time(),
                    level=draft.level,
                    type=draft.type,
                    message=draft.message,
                    data=draft.data,
                )
            )
            if draft.type != "step_metrics":
                logger.info("job %s: %s: %s", record.id, draft.type, draft.message)
        self._records[record.id] = record
        future = self.journal.put(record, events, urgent=urgent)
        for listener in self.listeners:
            listener(record)
        waiter = self._waiters.pop(record.id, None)
        if waiter is not None:
            waiter.set()
        return future

    async def wait_until(self, job: str, done: Callable[[JobRecord], bool], timeout_s: float) -> JobRecord:
        """The record once ``done`` holds, or as it is after ``timeout_s``."""
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

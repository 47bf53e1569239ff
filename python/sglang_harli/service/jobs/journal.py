"""The writer thread between the event loop and the job store: ordered, grouped, never silent.

The loop decides in memory and hands each decision over; a caller that must not answer before it is
durable awaits the future.  What the store holds is always a prefix of what was decided.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from sglang_harli.errors import NotReadyError
from sglang_harli.protocol.public import CODING_ERRORS, Event, Job
from sglang_harli.service.jobs.folder import JobMirror
from sglang_harli.service.jobs.store import JobStore, StoredObject, UnwritableError
from sglang_harli.service.jobs.transitions import JobRecord

logger = logging.getLogger(__name__)

GROUP_S = 0.2  # metrics wait this long for company: one fsync instead of many
RETRY_S = 1.0
JOB_FILE_S = 1.0  # job.json follows mere progress at this pace
COPY_AGAIN_S = 5.0  # after a readable copy could not be written


class Journal:
    """Writes changes of jobs in order, several in one transaction, and says when they are durable.

    The store is written first, then the mirror.  ``public`` makes a record's job.json.  Futures are
    resolved, and ``on_commit`` called with the ids of jobs written, on ``loop``.
    """

    def __init__(
        self,
        store: JobStore,
        mirror: JobMirror,
        public: Callable[[JobRecord], Job],
        loop: asyncio.AbstractEventLoop,
        on_commit: Callable[[set[str]], None],
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._public = public
        self._loop = loop
        self._on_commit = on_commit
        self._wake = threading.Condition()
        self._records: dict[str, JobRecord] = {}
        self._events: list[Event] = []
        self._settings: dict[str, str] = {}
        self._objects: list[StoredObject] = []
        self._futures: list[tuple[asyncio.Future[None], str | None]] = []  # and the job that each is about
        self._urgent = False
        self._closing = False
        self._shown: dict[str, tuple[str, float]] = {}  # job -> (status, when) of its job.json
        self._behind: dict[str, JobRecord] = {}  # jobs whose copies may lack something
        self._copy_at = 0.0  # when they are looked at next
        self._uncopied: dict[str, str] = {}  # jobs whose copies cannot be written, and why: not tried again
        self.trouble: str | None = None  # why nothing can be written at the moment
        self.unwritable: dict[str, str] = {}  # jobs whose latest change the store will never take, and why
        self.ended: asyncio.Future[None] = loop.create_future()  # done when the thread is gone
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)  # close() waits
        self._thread.start()

    # ---- on the loop
    def put(
        self,
        record: JobRecord | None = None,
        events: list[Event] | None = None,
        settings: dict[str, str] | None = None,
        *,
        objects: Sequence[StoredObject] = (),
        urgent: bool = True,
    ) -> asyncio.Future[None]:
        """Hand over a decision; the future is done when it is durable."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._wake:
            if record is not None:
                self._records[record.id] = record
            self._events += events or []
            self._settings |= settings or {}
            self._objects += objects
            self._futures.append((future, record.id if record is not None else None))
            self._urgent = self._urgent or urgent
            self._wake.notify()
        return future

    def check(self, records: Iterable[JobRecord]) -> None:
        """Complete these jobs' readable copies, one by one, when there is nothing else to write."""
        with self._wake:
            self._behind |= {record.id: record for record in records}
            self._wake.notify()

    def close(self) -> None:
        """Write what is left and end the thread (waits for it)."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # ---- in the thread
    def _run(self) -> None:
        try:
            while self._one_group():
                pass
        finally:
            self._call(lambda: self.ended.done() or self.ended.set_result(None))

    def _one_group(self) -> bool:
        with self._wake:
            behind = self._wait()
            if behind is None:
                self._wake.wait_for(lambda: self._urgent or self._closing, timeout=GROUP_S)
            records, self._records = self._records, {}
            events, self._events = self._events, []
            settings, self._settings = self._settings, {}
            objects, self._objects = self._objects, []
            futures, self._futures = self._futures, []
            self._urgent = False
            closing = self._closing
        if behind is not None:
            self._complete(behind)
        if futures:
            refused = self._write(records, events, settings, objects)
            if refused is None:
                return False
            for job in refused:
                records.pop(job, None)
            self._copy(records, [event for event in events if event.job not in refused])
            self._call(lambda: self._committed(set(records), futures, refused))
        return not closing

    def _wait(self) -> JobRecord | None:
        """Until there is something to write (None), or time for a job whose copies are behind."""
        while not self._futures and not self._closing:
            left = max(0.0, self._copy_at - time.monotonic()) if self._behind else None
            if left == 0.0:
                return next(iter(self._behind.values()))
            self._wake.wait(left)
        return None

    def _write(
        self,
        records: dict[str, JobRecord],
        events: list[Event],
        settings: dict[str, str],
        objects: list[StoredObject],
    ) -> dict[str, str] | None:
        """Try until it is written; None when the service ends before that.  Returns jobs whose
        changes the store will never take, and why; others' are written."""
        refused: dict[str, str] = {}
        try:
            return refused if self._try(records.values(), events, settings, objects) else None
        except UnwritableError:
            pass  # of one of them: each by itself, with its events
        for job in dict.fromkeys([*records, *(event.job for event in events)]):
            own = [records[job]] if job in records else []
            try:
                if not self._try(own, [event for event in events if event.job == job], {}, []):
                    return None
            except UnwritableError as error:
                logger.error("job %s: %s", job, error.message)
                refused[job] = self.unwritable[job] = error.message
        return refused if self._try([], [], settings, objects) else None

    def _try(
        self,
        records: Iterable[JobRecord],
        events: list[Event],
        settings: dict[str, str],
        objects: list[StoredObject],
    ) -> bool:
        """As ``_write``: False when the service ends before that.  Raises UnwritableError."""
        while True:
            try:
                self._store.write(records, events, settings, objects)
                if self.trouble is not None:
                    logger.info("the job store can be written again")
                self.trouble = None
                return True
            except NotReadyError as error:
                self.trouble = error.message
                logger.error("%s; trying again every %s s", self.trouble, RETRY_S)
            with self._wake:
                if self._wake.wait_for(lambda: self._closing, timeout=RETRY_S):
                    return False

    # ---- the readable copies (the store has it all: they may be late, never wrong)
    def _copy(self, records: dict[str, JobRecord], events: list[Event]) -> None:
        upto: dict[str, int] = {}
        for event in events:
            upto[event.job] = event.id
        now = time.monotonic()
        for record in records.values():
            status, when = self._shown.get(record.id, ("", 0.0))
            show = status != record.status or now - when >= JOB_FILE_S
            self._copy_one(record, upto.get(record.id), show)

    def _copy_one(self, record: JobRecord, upto: int | None, show: bool) -> None:
        if not self._copied(record, upto, show):
            return
        if show:
            self._shown[record.id] = (record.status, time.monotonic())
            if record.status.final:
                self._mirror.forget(record.id)
                self._shown.pop(record.id, None)
        if record.id in self._behind:
            self._put_off(record, soon=True)  # what was missing before this record

    def _copied(self, record: JobRecord, upto: int | None, show: bool, *, anew: bool = True) -> bool:
        """Write copies, into a folder that is gone only with ``anew``; False: not now, or never."""
        try:
            if anew or self._mirror.has(record.id):
                if upto is not None:
                    self._mirror.events(record.id, upto)
                if show:
                    self._mirror.job(self._public(record))
            return True
        except (OSError, NotReadyError) as error:
            logger.warning("the copies in job %s's folder cannot be written now: %s", record.id, error)
            self._put_off(record)
        except CODING_ERRORS as error:
            self._leave_out(record, error)
        return False

    def _leave_out(self, record: JobRecord, error: Exception) -> None:
        """The copies of this job cannot be written, now or later: the store has it all."""
        why = f"{type(error).__name__}: {error}"
        if self._uncopied.get(record.id) != why:
            logger.error("the copies in job %s's folder cannot be written: %s", record.id, why)
        self._uncopied[record.id] = why
        with self._wake:
            self._behind.pop(record.id, None)

    def _put_off(self, record: JobRecord, *, soon: bool = False) -> None:
        with self._wake:
            self._behind[record.id] = record
            if not soon:
                self._copy_at = time.monotonic() + COPY_AGAIN_S

    def _complete(self, record: JobRecord) -> None:
        """Bring a job's copies up to the store; a folder that somebody removed stays away."""
        if not self._copied(record, record.last_event, True, anew=False):
            return
        if record.status.final:
            self._mirror.forget(record.id)
        with self._wake:
            if self._behind.get(record.id) is record:
                del self._behind[record.id]

    def _committed(
        self, jobs: set[str], futures: list[tuple[asyncio.Future[None], str | None]], refused: dict[str, str]
    ) -> None:
        for future, job in futures:
            if future.done():
                continue
            if job in refused:
                future.set_exception(UnwritableError(refused[job]))
            else:
                future.set_result(None)
        self._on_commit(jobs)

    def _call(self, callback: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

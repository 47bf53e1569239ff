"""The order in which jobs leave the queue, and why one of them waits."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from sglang_harli.core import JobStatus
from sglang_harli.names import short_id
from sglang_harli.service.jobs.transitions import JobRecord

_Place = tuple[int, int, str]  # (-priority, number, id)


class QueueOrder:
    """Higher priority first, then the order of creation; a job that comes back finds its old place.

    A sorted list that follows each change: the next job is found at once, a place by bisection.  A
    held job keeps its place and is passed over.  ``other_base`` says why a job's base is not served
    ("": it is), asked at each ``update``.
    """

    def __init__(self, other_base: Callable[[JobRecord], str] = lambda record: "") -> None:
        self._other_base = other_base
        self._others: dict[str, str] = {}  # queued jobs of another base -> which
        self._ready: list[_Place] = []  # of the queued jobs that are not held, sorted
        self._places: dict[str, _Place] = {}  # of all queued jobs
        self._holds: dict[str, str] = {}  # job -> why it does not start now
        self._lasting: set[str] = set()  # those of ``_holds`` that do not end by themselves
        self._training: dict[str, None] = {}  # running and not merely publishing, oldest first

    def update(self, record: JobRecord) -> None:
        """Take a job's new state over."""
        place, other = None, ""
        if record.status == JobStatus.QUEUED:
            place = (-record.priority, record.number, record.id)
            other = self._other_base(record)
        if place != self._places.get(record.id) or other != self._others.get(record.id, ""):
            self._remove(record.id)
            _set(self._others, record.id, other)
            if place is not None:
                self._insert(record.id, place)
        if record.status == JobStatus.RUNNING and not record.publishing:
            self._training[record.id] = None
        else:
            self._training.pop(record.id, None)

    def hold(self, job: str, reason: str, *, lasting: bool = False) -> None:
        """Pass the job over for a shown reason, "" ends that; ``lasting``: not by itself."""
        place = self._places.get(job)
        self._remove(job)
        _set(self._holds, job, reason)
        self._lasting.discard(job)
        if reason and lasting:
            self._lasting.add(job)
        if place is not None:
            self._insert(job, place)

    def _insert(self, job: str, place: _Place) -> None:
        self._places[job] = place
        if job not in self._holds and job not in self._others:
            insort(self._ready, place)

    def _remove(self, job: str) -> None:
        place = self._places.pop(job, None)
        if place is not None and job not in self._holds and job not in self._others:
            del self._ready[bisect_left(self._ready, place)]

    def first(self) -> str | None:
        """The id of the job whose turn is next."""
        return self._ready[0][2] if self._ready else None

    def lasting(self, job: str) -> str:
        """What keeps a queued job until another base or server comes; "": nothing does."""
        if job not in self._places:
            return ""
        return self._others.get(job) or (self._holds[job] if job in self._lasting else "")

    def reason(self, job: str) -> str | None:
        """What a queued job waits for within the queue; None for any other job."""
        place = self._places.get(job)
        if place is None:
            return None
        if waits := self._others.get(job) or self._holds.get(job):
            return waits
        ahead = bisect_left(self._ready, place)
        count = "next" if ahead == 0 else f"{ahead} job{'s' if ahead > 1 else ''} ahead"
        running = next(iter(self._training), None)
        if running is None:
            return "next: about to start" if ahead == 0 else count
        return f"{count}; job {short_id(running)} is running"


def _set(table: dict[str, str], job: str, text: str) -> None:
    if text:
        table[job] = text
    else:
        table.pop(job, None)

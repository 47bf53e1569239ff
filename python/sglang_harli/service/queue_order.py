"""The order in which jobs leave the queue, and why one of them waits."""

from __future__ import annotations

from bisect import bisect_left, insort

from sglang_harli.core import JobStatus, short_id
from sglang_harli.service.jobs import JobRecord


class QueueOrder:
    """Higher priority first, then the order of creation; a job that comes back finds its old place.

    A sorted list that follows each change: the next job is found at once, a place by bisection.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[int, int, str]] = []  # (-priority, number, id) of the queued jobs
        self._of: dict[str, tuple[int, int, str]] = {}
        self._training: dict[str, None] = {}  # running and not merely publishing, oldest first

    def update(self, record: JobRecord) -> None:
        """Take a job's new state over."""
        key = None
        if record.status == JobStatus.QUEUED:
            key = (-record.priority, record.number, record.id)
        old = self._of.get(record.id)
        if key != old:
            if old is not None:
                del self._keys[bisect_left(self._keys, old)]
                del self._of[record.id]
            if key is not None:
                insort(self._keys, key)
                self._of[record.id] = key
        if record.status == JobStatus.RUNNING and not record.publishing:
            self._training[record.id] = None
        else:
            self._training.pop(record.id, None)

    def first(self) -> str | None:
        """The id of the job whose turn is next."""
        return self._keys[0][2] if self._keys else None

    def reason(self, job: str) -> str | None:
        """What a queued job waits for within the queue; None for any other job."""
        key = self._of.get(job)
        if key is None:
            return None
        ahead = bisect_left(self._keys, key)
        count = "next" if ahead == 0 else f"{ahead} job{'s' if ahead > 1 else ''} ahead"
        running = next(iter(self._training), None)
        if running is None:
            return "next: about to start" if ahead == 0 else count
        return f"{count}; job {short_id(running)} is running"

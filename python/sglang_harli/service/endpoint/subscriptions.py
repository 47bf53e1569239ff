"""Followers of a job's events: pushed from the store, under a lease, at the follower's own pace.

A follower is a cursor into the store, nothing is queued for it.  One that does not read stays where
it is until its lease ends; one that vanished is forgotten at the next push.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from sglang_harli.errors import NotReadyError
from sglang_harli.protocol.public import Event
from sglang_harli.service.jobs.store import JobStore

logger = logging.getLogger(__name__)

LEASE_S = 30.0
RETRY_S = 0.25  # before a follower whose queue was full is tried again
TROUBLE_S = 2.0  # before a store that cannot be read is asked again
AT_ONCE = 200
MAX_FOLLOWERS = 1000


@dataclass(slots=True)
class Follower:
    """A cursor into a job's events."""

    route: tuple[bytes, ...]  # frames before the header of what is sent to it
    request: str
    job: str
    cursor: int
    until: float
    behind: bool = False  # its queue was full


class Subscriptions:
    """Followers of jobs' events, each with a lease that it renews.  ``push`` sends an event to
    (route, request id): True sent, False its queue is full, None it is gone."""

    def __init__(
        self,
        store: JobStore,
        readers: Executor,
        push: Callable[[tuple[bytes, ...], str, Event], bool | None],
    ) -> None:
        self._store = store
        self._readers = readers
        self._push = push
        self._followers: dict[tuple[tuple[bytes, ...], str], Follower] = {}
        self._due: set[str] = set()
        self._wake = asyncio.Event()
        self.trouble: str | None = None  # why events cannot be read at the moment

    def follow(self, route: tuple[bytes, ...], request: str, job: str, after: int) -> None:
        """Begin or renew: the key is the route and the request's id.  NotReadyError: too many."""
        key = (route, request)
        if key not in self._followers and len(self._followers) >= MAX_FOLLOWERS:
            raise NotReadyError(f"there are {MAX_FOLLOWERS} followers already: poll `events` without follow")
        self._followers[key] = Follower(route, request, job, after, time.monotonic() + LEASE_S)
        self.committed({job})

    def unfollow(self, route: tuple[bytes, ...], request: str | None) -> int:
        """End one follower of this route, or all; returns how many."""
        gone = [key for key in self._followers if key[0] == route and request in (None, key[1])]
        for key in gone:
            del self._followers[key]
        return len(gone)

    def committed(self, jobs: set[str]) -> None:
        """Events of these jobs may have become durable."""
        self._due |= jobs
        self._wake.set()

    def __len__(self) -> int:
        return len(self._followers)

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._nap_s())
            self._wake.clear()
            due, self._due = self._due, set()
            now = time.monotonic()
            for key, follower in list(self._followers.items()):
                if follower.until < now:
                    self._followers.pop(key, None)
                elif follower.job in due or follower.behind:
                    await self._try(key, follower)

    async def _try(self, key: tuple[tuple[bytes, ...], str], follower: Follower) -> None:
        """One follower's events; what goes wrong with them does not concern the others."""
        try:
            await self._deliver(key, follower)
        except NotReadyError as error:
            if self.trouble is None:
                logger.error("followers wait: %s", error.message)
            self.trouble, follower.behind = error.message, True
        except Exception:  # boundary: one follower has to ask again; the others go on
            logger.exception("the events of job %s cannot be sent to a follower", follower.job)
            self._followers.pop(key, None)
        else:
            self.trouble = None

    def _nap_s(self) -> float:
        """How long there is nothing to do unless something is committed."""
        followers = self._followers.values()
        if any(follower.behind for follower in followers):
            return RETRY_S if self.trouble is None else TROUBLE_S
        first = min((follower.until for follower in followers), default=float("inf"))
        return min(LEASE_S, max(RETRY_S, first - time.monotonic()))

    async def _deliver(self, key: tuple[tuple[bytes, ...], str], follower: Follower) -> None:
        loop = asyncio.get_running_loop()
        follower.behind = False
        events = await loop.run_in_executor(
            self._readers, self._store.events, follower.job, follower.cursor, AT_ONCE
        )
        for event in events:
            if self._followers.get(key) is not follower:  # ended or renewed meanwhile
                return
            sent = self._push(follower.route, follower.request, event)
            if sent is None:
                del self._followers[key]
                return
            if not sent:
                follower.behind = True
                return
            follower.cursor = event.id
        follower.behind = len(events) == AT_ONCE
        if follower.behind:  # more than was read at once: others get their turn first
            self.committed({follower.job})

"""HTTP process: watches the finetune service from the server's event loop; keeps its metrics.

A service that is silent for too long (stopped, hung, deadlocked) is killed, so that its supervisor
starts another; one that is given up is replaced by an endpoint that says so.  Silence is counted in
ticks of this loop, not in time: while the loop itself stands still nothing can be heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_harli.config import HarliOptions
from sglang_harli.managers.http.metrics_collector import MetricsCollector
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.supervision.supervisor import Supervisor
from sglang_harli.managers.http.supervision.unavailable_endpoint import UnavailableEndpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How many looks, ``tick_s`` seconds apart, a service may be ``silent`` (it speaks every five
    seconds), or ``starting`` without a first message, before it is killed."""

    tick_s: float = 1.0
    silent: int = 30
    starting: int = 120


class SilenceCounter:
    """Looks in a row at which one and the same process had said nothing (pure)."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._pid: int | None = None
        self._heard: int | None = None
        self._spoken = False
        self.looks = 0

    def look(self, pid: int | None, heard: int, speaker: int | None = None) -> bool:
        """Whether the process ``pid`` (None: none) has been silent for too long, after ``heard``
        messages in all; ``speaker`` sent the latest, maybe before the first look at it."""
        if pid is None or pid != self._pid:
            self._pid, self._heard, self._spoken, self.looks = pid, heard, speaker == pid, 0
            return False
        if heard != self._heard:
            self._heard, self._spoken, self.looks = heard, True, 0
            return False
        self.looks += 1
        limit = self._patience.silent if self._spoken else self._patience.starting
        if self.looks < limit:
            return False
        self._pid = None
        return True


class Watchdog:
    """Restarts a service that is silent, and replaces one that is given up.  ``keeper``: the
    service's supervisor; None: started by somebody else, so not watched."""

    def __init__(
        self,
        options: HarliOptions,
        keeper: Callable[[], Supervisor | None],
        publisher: AdapterPublisher,
        metrics: MetricsCollector | None,
        patience: Patience = Patience(),
    ) -> None:
        self._options = options
        self._keeper = keeper
        self._publisher = publisher
        self._metrics = metrics
        self._patience = patience
        self._silence = SilenceCounter(patience)
        self._task: asyncio.Task[None] | None = None
        self._stand_in: UnavailableEndpoint | None = None

    def start(self) -> None:
        """Inside the server's running event loop, after the publisher's start."""
        self._task = asyncio.create_task(self._run(), name="harli-watchdog")
        self._task.add_done_callback(_log_failure)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._stand_in is not None:
            self._stand_in.stop()
            self._stand_in = None

    async def _run(self) -> None:
        while True:
            keeper = self._keeper()
            if keeper is not None:
                self._look(keeper)
            if self._metrics is not None:
                self._metrics.refresh(keeper, self._publisher.state, self._publisher.pair)
            await asyncio.sleep(self._patience.tick_s)

    def _look(self, keeper: Supervisor) -> None:
        if keeper.gave_up is not None:
            if self._stand_in is None:
                self._degrade(keeper.gave_up)
            return
        if not self._publisher.listening:
            return  # nothing that the service says is heard: its silence says nothing about it
        pid, state = keeper.pid, self._publisher.state
        if self._silence.look(pid, self._publisher.received, state.pid if state is not None else None):
            looks = self._silence.looks
            logger.error(
                "harli: the finetune service (pid %s) has said nothing for %d looks of %g s: killed, to be started "
                "again; serving goes on, and nothing that was acknowledged is lost",
                *(pid, looks, self._patience.tick_s),
            )
            keeper.kill_child()

    def _degrade(self, why: str) -> None:
        """The supervisor has said so in the log."""
        self._publisher.go_down(why)
        state = self._publisher.state
        self._stand_in = UnavailableEndpoint(self._options, why, state.jobs if state is not None else {})
        self._stand_in.start()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("harli: the finetune service is not watched any more", exc_info=task.exception())

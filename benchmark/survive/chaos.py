"""Kills at random from a seed: the service, the service held still, and everything; and the
server's return."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from common.servers import Server
from sglang_harli import AsyncFinetuneClient
from sglang_harli.errors import HarliError
from survive.traffic import Gate

SERVICE = "sglang_harli.service.app"
SERVICE_EVERY_S = (40.0, 110.0)
EVERYTHING_EVERY_S = (390.0, 480.0)  # so that processes live for the five minutes after which they are judged
STALL_EVERY_S = (500.0, 700.0)
BACK_S = 10.0  # a killed service is to be back within


@dataclass(frozen=True, slots=True)
class Blow:
    """``at_s`` after the start; ``what``: service, stall or everything."""

    at_s: float
    what: str


def plan(seed: int, seconds: float) -> list[Blow]:
    """All blows of a soak (pure).  A short soak has one kill of everything, half way."""
    rng = random.Random(seed)
    blows = []
    for what, every in (
        ("service", SERVICE_EVERY_S),
        ("everything", EVERYTHING_EVERY_S),
        ("stall", STALL_EVERY_S),
    ):
        at = rng.uniform(*every)
        while at < seconds - 45:
            blows.append(Blow(at, what))
            at += rng.uniform(*every)
    if not any(blow.what == "everything" for blow in blows):
        blows.append(Blow(seconds / 2, "everything"))
    return sorted(blows, key=lambda blow: blow.at_s)


@dataclass
class Chaos:
    """Strikes a server and brings it back.

    Args:
        start: starts the server again, on the same ports and run directory.
        server: the one that runs.
        gate: closed before the server is killed.

    Attributes:
        kills: when everything was killed (``time.time``).
        service_back_s: how long each killed service was away.
        stalls_back_s: how long until a service that was held still was replaced.
        restarts_s: how long each restart of the server took.
    """

    start: Callable[[], Server]
    server: Server
    gate: Gate
    kills: list[float] = field(default_factory=list)
    service_back_s: list[float] = field(default_factory=list)
    stalls_back_s: list[float] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)

    async def run(self, blows: list[Blow]) -> None:
        began = time.monotonic()
        for blow in blows:
            await asyncio.sleep(max(0.0, began + blow.at_s - time.monotonic()))
            print(f"[{time.monotonic() - began:6.0f} s] {blow.what}", flush=True)
            if blow.what == "everything":
                await self._everything()
            elif blow.what == "service":
                self.service_back_s += await self._service(signal.SIGKILL)
            else:
                self.stalls_back_s += await self._service(signal.SIGSTOP)

    async def _everything(self) -> None:
        self.gate.shut()
        self.kills.append(time.time())
        for process in self.server.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.server.process.wait()
        self.server = self.start()
        self.restarts_s.append(await asyncio.to_thread(self.server.wait_ready))
        self.gate.release()

    async def _service(self, sign: signal.Signals) -> list[float]:
        """Send a signal to the service; seconds until another one answers (none: there was nobody
        to hit)."""
        victim = self._find()
        if victim is None:
            return []  # a blow before has hit it, and its follower is on the way
        began = time.monotonic()
        victim.send_signal(sign)
        while True:
            found = self._find()
            if found is not None and found.pid != victim.pid and await self._answers(found.pid):
                return [time.monotonic() - began]
            if self.server.process.poll() is not None:
                raise RuntimeError(f"the server has ended by itself:\n{self.server.log_tail()}")
            await asyncio.sleep(0.1)

    def _find(self) -> psutil.Process | None:
        with contextlib.suppress(LookupError):
            return self.server.find(SERVICE)
        return None

    async def _answers(self, pid: int) -> bool:
        with contextlib.suppress(HarliError):
            async with AsyncFinetuneClient(
                self.server.endpoint, connect_timeout_s=5, reply_timeout_s=5
            ) as client:
                return (await client.status()).service["pid"] == pid
        return False

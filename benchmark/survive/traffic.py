"""Streaming requests that run while the server is healthy, and every gap between their tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import orjson

REQUEST_TIMEOUT_S = 180.0
HEALTH_EVERY_S = 0.5


@dataclass(slots=True)
class Seen:
    """One request.  Times are of ``time.time``; ``gaps``: (when, seconds) of each gap between two
    tokens."""

    began: float
    ended: float = 0.0
    adapter: str | None = None
    error: str | None = None
    gaps: list[tuple[float, float]] = field(default_factory=list)


class Gate:
    """Open while ``/health`` answers; ``shut`` closes it at once, before the server is killed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open = asyncio.Event()
        self._held = False

    async def wait(self) -> None:
        await self._open.wait()

    def shut(self) -> None:
        self._held = True
        self._open.clear()

    def release(self) -> None:
        self._held = False

    async def run(self, session: aiohttp.ClientSession) -> None:
        timeout = aiohttp.ClientTimeout(total=20)
        while True:
            try:
                async with session.get(f"{self._url}/health", timeout=timeout) as answer:
                    healthy = answer.status == 200
            except (aiohttp.ClientError, TimeoutError):
                healthy = False
            if healthy and not self._held:
                self._open.set()
            else:
                self._open.clear()
            await asyncio.sleep(HEALTH_EVERY_S)


class Traffic:
    """Closed loop of ``streams`` clients.

    Args:
        url: of the server.
        prompts: chosen from at random.
        adapters: the names that answer at the moment; a share of the requests goes to one of them.
        pause_s: most seconds that a client rests between two requests.
        health_url: of the server whose health is looked at, where it is another one.
    """

    def __init__(
        self,
        url: str,
        prompts: Sequence[str],
        *,
        streams: int,
        seed: int,
        adapters: Callable[[], Sequence[str]] = tuple,
        adapter_share: float = 0.3,
        tokens: tuple[int, int] = (16, 64),
        pause_s: float = 1.0,
        health_url: str | None = None,
    ) -> None:
        self.seen: list[Seen] = []
        self.gate = Gate(health_url or url)
        self._url, self._prompts, self._streams, self._seed = url, prompts, streams, seed
        self._adapters, self._share = adapters, adapter_share
        self._tokens, self._pause_s = tokens, pause_s

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop``; the requests under way are finished."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            health = asyncio.create_task(self.gate.run(session))
            async with asyncio.TaskGroup() as group:
                for number in range(self._streams):
                    rng = random.Random(f"{self._seed} {number}")
                    group.create_task(self._client(session, rng, stop))
            health.cancel()

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random, stop: asyncio.Event) -> None:
        ended = asyncio.create_task(stop.wait())
        while not stop.is_set():
            opened = asyncio.create_task(self.gate.wait())
            await asyncio.wait([opened, ended], return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            if not stop.is_set():
                await self._one(session, rng)
                await asyncio.sleep(rng.uniform(0, self._pause_s))

    async def _one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        known = self._adapters()
        adapter = rng.choice(known) if known and rng.random() < self._share else None
        wanted = rng.randint(*self._tokens)
        body = {
            "text": rng.choice(self._prompts),
            "stream": True,
            "sampling_params": {"max_new_tokens": wanted, "temperature": 0, "ignore_eos": True},
            **({"lora_path": adapter} if adapter else {}),
        }
        seen = Seen(time.time(), adapter=adapter)
        try:
            tokens = await self._stream(session, body, seen)
            if seen.error is None and tokens != wanted:
                seen.error = f"{tokens} tokens came, {wanted} were asked for"
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = f"{type(error).__name__}: {error}"
        seen.ended = time.time()
        self.seen.append(seen)

    async def _stream(self, session: aiohttp.ClientSession, body: dict, seen: Seen) -> int:
        tokens, last = 0, 0.0
        async with session.post(f"{self._url}/generate", json=body) as answer:
            if answer.status != 200:
                seen.error = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                return 0
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = orjson.loads(line[6:])
                if "error" in chunk:
                    seen.error = str(chunk["error"])[:300]
                    continue
                if (count := chunk["meta_info"]["completion_tokens"]) > tokens:
                    now = time.time()
                    if tokens:
                        seen.gaps.append((now, now - last))
                    tokens, last = count, now
        return tokens


def excused(seen: Seen, kills: Sequence[float]) -> bool:
    """Whether the server itself was killed while the request was in flight."""
    return any(seen.began <= kill <= seen.ended for kill in kills)

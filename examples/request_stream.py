"""A steady stream of streaming requests, and the latency of each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import orjson

REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """One request.  Times are of ``time.monotonic``, in seconds; ``error`` is None where it
    succeeded.

    Attributes:
        first, last: arrival of the first and of the last token (equal to ``start`` on an error).
        tokens: tokens received.
    """

    start: float
    first: float
    last: float
    tokens: int
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.last - self.first) / max(self.tokens - 1, 1)


class RequestStream:
    """Sends a request every ``1/rate`` seconds, or when one of ``at_once`` is done; ``served``
    grows.

    Args:
        url: of the server.
        prompts: taken in turn.
        rate: requests per second.
        at_once: most requests under way; keeps a slow device from drowning.
        max_new_tokens: of every request; the end of a turn does not end it, so that each has a
            TPOT.
    """

    def __init__(
        self, url: str, prompts: Sequence[str], *, rate: float, max_new_tokens: int, at_once: int = 8
    ) -> None:
        self.served: list[Served] = []
        self._url, self._prompts = url, prompts
        self._places = asyncio.Semaphore(at_once)
        self._rate, self._max_new_tokens = rate, max_new_tokens

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sends while the block runs; at its end the requests under way are finished."""
        stop = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            sender = asyncio.create_task(self._send(session, stop))
            try:
                yield
            finally:
                stop.set()
                await sender

    async def until(self, count: int) -> None:
        """Wait until so many requests have been served."""
        while len(self.served) < count:
            await asyncio.sleep(0.05)

    async def _send(self, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for prompt in self._turns():
                await self._places.acquire()
                group.create_task(self._one(session, prompt)).add_done_callback(
                    lambda _: self._places.release()
                )
                due = max(due, time.monotonic()) + 1 / self._rate
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), max(0.0, due - time.monotonic()))
                if stop.is_set():
                    return

    def _turns(self) -> Iterator[str]:
        while True:
            yield from self._prompts

    async def _one(self, session: aiohttp.ClientSession, prompt: str) -> None:
        start = time.monotonic()
        first = last = start
        tokens, error = 0, None
        parameters = {"max_new_tokens": self._max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"text": prompt, "stream": True, "sampling_params": parameters}
        try:
            async with session.post(f"{self._url}/generate", json=body) as answer:
                if answer.status != 200:
                    error = f"HTTP {answer.status}: {(await answer.text())[:200]}"
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = orjson.loads(line[6:])
                    if "error" in chunk:
                        error = str(chunk["error"])
                        continue
                    if (count := chunk["meta_info"]["completion_tokens"]) > tokens:
                        last = time.monotonic()
                        first = first if tokens else last
                        tokens = count
        except (aiohttp.ClientError, TimeoutError) as trouble:
            error = f"{type(trouble).__name__}: {trouble}"
        if error is None and tokens != self._max_new_tokens:
            error = f"{tokens} tokens came, {self._max_new_tokens} were asked for"
        self.served.append(Served(start, first, last, tokens, error))


def attainment(served: Sequence[Served], target_s: float) -> float:
    """Share of the requests whose mean time per output token met the target."""
    met = [one for one in served if one.error is None and one.tpot_s <= target_s]
    return len(met) / len(served) if served else 0.0

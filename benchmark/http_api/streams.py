"""Requests for tokens, and the time from each token to the next as a client sees it.

``python -m http_api.streams URL STREAMS PROMPT_TOKENS OUTPUT_TOKENS VOCAB`` sends the next request
of a stream when the last one has ended, until its stdin is closed; prints gaps and means as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from typing import Any

import aiohttp


class Streams:
    """``gaps``: seconds between the chunks of a request; ``tpots``: each request's mean;
    ``failed``: what went wrong."""

    def __init__(self, url: str, prompt: int, tokens: int, vocab: int) -> None:
        self._url, self._prompt, self._tokens, self._vocab = f"{url}/generate", prompt, tokens, vocab
        self.gaps: list[float] = []
        self.tpots: list[float] = []
        self.failed: list[str] = []

    async def run(self, session: aiohttp.ClientSession, number: int, ended: asyncio.Event) -> None:
        rng = random.Random(number)
        while not ended.is_set():
            try:
                await self._one(session, [rng.randrange(10, self._vocab) for _ in range(self._prompt)])
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.failed.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(0.1)

    async def _one(self, session: aiohttp.ClientSession, prompt: list[int]) -> None:
        sampling = {"temperature": 0, "max_new_tokens": self._tokens, "ignore_eos": True}
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        arrived: list[float] = []
        async with session.post(self._url, json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status} {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                if b'"error"' in line:
                    raise ValueError(line.decode())
                arrived.append(time.perf_counter())
        if len(arrived) < 2:
            raise ValueError(f"{len(arrived)} chunks came")
        self.gaps += [after - before for before, after in itertools.pairwise(arrived)]
        self.tpots.append((arrived[-1] - arrived[0]) / (self._tokens - 1))


async def main(url: str, count: int, prompt: int, tokens: int, vocab: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    closed = loop.run_in_executor(None, sys.stdin.read)
    closed.add_done_callback(lambda _done: ended.set())
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300)) as session:
        streams = Streams(url, prompt, tokens, vocab)
        await asyncio.gather(*(streams.run(session, number, ended) for number in range(count)))
    print(json.dumps({"gaps": streams.gaps, "tpots": streams.tpots, "failed": streams.failed}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *(int(number) for number in sys.argv[2:6])))

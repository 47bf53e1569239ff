"""Clients that watch jobs: each asks for a list, one job and its events, again and again.

``python -m http_api.clients URL CLIENTS EVERY_S SECONDS`` prints each answer's seconds as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time

import aiohttp

KINDS = ("list", "status", "events")
LIMIT = 20  # jobs and events of a page
NICE = 10


class Clients:
    """Their answers: seconds by kind, and what was not answered with 200."""

    def __init__(self, url: str, jobs: list[str]) -> None:
        self._url, self._jobs = f"{url}/v1/fine_tuning/jobs", jobs
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.failed: list[str] = []
        self.late = 0  # rounds that began after their time

    async def run(self, session: aiohttp.ClientSession, number: int, every_s: float, seconds: float) -> None:
        rng = random.Random(number)
        at = time.monotonic() + every_s * rng.random()
        end = time.monotonic() + seconds
        while at < end:
            if (wait := at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            else:
                self.late += 1
            job = rng.choice(self._jobs)
            for kind, path in zip(
                KINDS, (f"?limit={LIMIT}", f"/{job}", f"/{job}/events?limit={LIMIT}"), strict=True
            ):
                await self._ask(session, kind, path)
            at += every_s

    async def _ask(self, session: aiohttp.ClientSession, kind: str, path: str) -> None:
        began = time.perf_counter()
        try:
            async with session.get(self._url + path) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failed.append(f"{kind}: {type(error).__name__}")
            return
        if answer.status != 200:
            self.failed.append(f"{kind}: {answer.status} {body[:200]!r}")
        self.seconds[kind].append(time.perf_counter() - began)


async def all_jobs(session: aiohttp.ClientSession, url: str) -> list[str]:
    found: list[str] = []
    while True:
        after = f"&after={found[-1]}" if found else ""
        async with session.get(f"{url}/v1/fine_tuning/jobs?limit=1000{after}") as answer:
            page = await answer.json()
        found += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            return found


async def main(url: str, count: int, every_s: float, seconds: float) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        clients = Clients(url, await all_jobs(session, url))
        await asyncio.gather(*(clients.run(session, n, every_s, seconds) for n in range(count)))
    print(json.dumps({"seconds": clients.seconds, "failed": clients.failed, "late": clients.late}))


if __name__ == "__main__":
    os.nice(NICE)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))

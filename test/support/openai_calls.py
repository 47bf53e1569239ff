"""The calls that the openai client made in a test run, for the end of the tests' output."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

CALLS = pytest.StashKey[Counter[str]]()
_ID = re.compile(r"\b(ftjob-|file-|upload_|ftckpt-)[0-9A-Za-z]+")


class Recorded:
    """Clients of the openai library whose answers are counted by method, path and status."""

    def __init__(self, config: pytest.Config) -> None:
        self._calls = config.stash.setdefault(CALLS, Counter())

    def http(self) -> httpx.Client:
        return openai.DefaultHttpxClient(event_hooks={"response": [self._count]})

    def asyncio(self) -> httpx.AsyncClient:
        async def count(answer: httpx.Response) -> None:
            self._count(answer)

        return openai.DefaultAsyncHttpxClient(event_hooks={"response": [count]})

    def _count(self, answer: httpx.Response) -> None:
        path = _ID.sub(r"\1...", answer.request.url.path)
        if answer.request.method == "DELETE" and path.startswith("/v1/models/"):
            path = "/v1/models/..."
        self._calls[f"{answer.request.method:6} {path:55} {answer.status_code}"] += 1


def write_summary(reporter: Any, config: pytest.Config) -> None:
    calls = config.stash.get(CALLS, None)
    if not calls:
        return
    reporter.section("calls of the openai client")
    for call, count in sorted(calls.items(), key=lambda item: item[0].split()[1]):
        reporter.line(f"{call}  {count} time{'s' * (count != 1)}")

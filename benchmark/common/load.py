"""A steady load of generation requests, and what each of them saw.  Standard library only."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Seen:
    """One finished request.

    Attributes:
        ttft_s: to the first token.
        tpot_s: mean seconds per output token after the first.
        tokens: output tokens.
        ended_s: when it ended, on ``time.perf_counter``'s clock.
    """

    ttft_s: float
    tpot_s: float
    tokens: int
    ended_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """Closed loop: ``streams`` clients, each sending its next request when the last one has
    ended."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    vocab: int
    seed: int = 0

    def prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(10, self.vocab) for _ in range(self.prompt_tokens)]


def generate(url: str, prompt: list[int], tokens: int) -> list[int]:
    """Greedy output token ids of one request."""
    body = {"input_ids": prompt, "sampling_params": _sampling(tokens)}
    with _open(url, body) as reply:
        return json.load(reply)["output_ids"]


def stream(url: str, prompt: list[int], tokens: int) -> Seen:
    """One streamed request, timed by the arrival of its chunks."""
    body = {"input_ids": prompt, "sampling_params": _sampling(tokens), "stream": True}
    began = time.perf_counter()
    first = last = 0.0
    count = 0
    with _open(url, body) as reply:
        for line in reply:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"a request failed: {chunk['error']}")
            last = time.perf_counter()
            first = first or last
            count = chunk["meta_info"]["completion_tokens"]
    if count == 0:
        raise RuntimeError("a request got no token")
    return Seen(first - began, (last - first) / max(count - 1, 1), count, last)


def run(url: str, load: Load, seconds: float) -> dict[str, Any]:
    """Keep the load up for ``seconds``; ``summary`` of the requests that ended within.

    Raises:
        RuntimeError: a request failed.
    """
    seen: list[Seen] = []
    failures: list[BaseException] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        rng = random.Random(f"{load.seed}-{number}")
        try:
            while time.perf_counter() < end and not failures:
                seen.append(stream(url, load.prompt(rng), load.output_tokens))
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)

    began = time.perf_counter()
    clients = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(load.streams)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {load.streams} clients failed: {failures[0]}") from failures[
            0
        ]
    return summary(seen, time.perf_counter() - began)


def summary(seen: list[Seen], wall_s: float) -> dict[str, Any]:
    """Tokens per second and the percentiles; ``tpots_ms`` is kept so that any target can be
    judged."""
    tpots = sorted(s.tpot_s * 1e3 for s in seen)
    ttfts = sorted(s.ttft_s * 1e3 for s in seen)
    return {
        "requests": len(seen),
        "seconds": round(wall_s, 2),
        "decode_tokens_per_s": round(sum(s.tokens for s in seen) / wall_s, 1),
        "tpot_ms": {p: round(percentile(tpots, p), 3) for p in (50, 90, 99)},
        "ttft_ms": {p: round(percentile(ttfts, p), 3) for p in (50, 90, 99)},
        "tpots_ms": [round(t, 3) for t in tpots],
    }


def percentile(ordered: list[float], percent: float) -> float:
    """Nearest rank."""
    rank = math.ceil(percent * len(ordered) / 100)
    return ordered[max(rank, 1) - 1]


def attainment(tpots_ms: list[float], target_ms: float) -> float:
    """Share of requests whose mean time per output token met the target."""
    return sum(t <= target_ms for t in tpots_ms) / len(tpots_ms)


def _sampling(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def _open(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/generate", data=json.dumps(body).encode(), headers=headers)
    return urllib.request.urlopen(request, timeout=600)

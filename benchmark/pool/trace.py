"""A request trace made from a seed, that a pool of a given size can just hold, and what each
request saw.

A trace is a list of waves.  All requests of a wave are sent at once and the next wave begins when
they have ended and a rest is over.  A wave never needs more slots than ``FILL`` of the pool,
prompts and outputs together: plain SGLang serves every request without a retraction, whatever the
timing.  Standard library only.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FILL = 0.92
CROWD = 8  # requests in a wave of many
KINDS = ("shared", "long", "crowd", "shared")
ANSWER = 48  # most tokens of an answer
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: token ids, and how many tokens it is to get."""

    prompt: tuple[int, ...]
    tokens: int

    @property
    def slots(self) -> int:
        """Most slots of the KV cache that it takes."""
        return len(self.prompt) + self.tokens


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that are sent at once, and the idle seconds after them.

    ``kind``: crowd (many of the same length), long (one that needs nearly the whole pool) or shared
    (many with one of a few beginnings in common, the same ones in all waves of a trace).
    """

    kind: str
    asks: tuple[Ask, ...]
    rest_s: float

    @property
    def slots(self) -> int:
        return sum(ask.slots for ask in self.asks)


@dataclass(slots=True)
class Seen:
    """One request: ``error`` is None where all its tokens came; ``gaps_s``: seconds between two of
    them."""

    name: str
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    retractions: int = 0
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)


def trace(seed: int, pool_tokens: int, vocab: int, waves: int, rest_s: float) -> list[Wave]:
    """``waves`` waves for a pool of ``pool_tokens`` slots (pure)."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, vocab) for _ in range(count))

    room = int(FILL * pool_tokens)
    each = room // CROWD
    answer = min(each // 4, ANSWER)
    beginnings = [ids(each // 2) for _ in range(2)]
    made = []
    for number in range(waves):
        kind = KINDS[number % len(KINDS)]
        if kind == "long":
            asks = [Ask(ids(room - answer), answer)]
        elif kind == "crowd":
            asks = [Ask(ids(each - answer), answer) for _ in range(CROWD)]
        else:
            own = each - each // 2 - answer
            asks = [Ask(beginnings[n % len(beginnings)] + ids(own), answer) for n in range(CROWD)]
        made.append(Wave(kind, tuple(asks), rest_s))
    return made


def drive(url: str, waves: Sequence[Wave], *, rests: bool = True) -> list[Seen]:
    """Send the trace, with the rests between its waves or without; what each request saw, named
    ``wave.request``."""
    seen: list[Seen] = []
    for number, wave in enumerate(waves):
        found = [Seen(f"{number}.{n}") for n in range(len(wave.asks))]
        threads = [
            threading.Thread(target=send, args=(url, ask, one), daemon=True)
            for ask, one in zip(wave.asks, found, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen += found
        time.sleep(wave.rest_s if rests else 0.0)
    return seen


def send(url: str, ask: Ask, seen: Seen) -> None:
    """One streamed greedy request; fills ``seen`` and raises nothing that the server may cause."""
    body = {
        "input_ids": list(ask.prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": ask.tokens, "ignore_eos": True},
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/generate", data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            _read(reply, seen)
    except urllib.error.HTTPError as error:
        seen.error = f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}"
    except (OSError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    if seen.error is None and seen.tokens != ask.tokens:
        seen.error = f"{seen.tokens} tokens came, {ask.tokens} were asked for"


def _read(reply: Any, seen: Seen) -> None:
    began = last = time.perf_counter()
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            seen.error = str(chunk["error"])[:300]
            continue
        now, meta = time.perf_counter(), chunk["meta_info"]
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            seen.error = f"aborted: {reason.get('message', '')[:300]}"
        seen.prompt_tokens = meta["prompt_tokens"]
        seen.cached_tokens = max(seen.cached_tokens, meta.get("cached_tokens") or 0)
        seen.retractions = meta.get("num_retractions") or seen.retractions
        new = meta["completion_tokens"] - seen.tokens
        if new > 0:
            if seen.tokens:
                seen.gaps_s += [(now - last) / new] * new
            else:
                seen.ttft_s = now - began
            seen.tokens, last = meta["completion_tokens"], now


def summary(seen: Sequence[Seen]) -> dict[str, Any]:
    """What the table and the judge need of a trace (pure)."""
    prompts = sum(one.prompt_tokens for one in seen)
    gaps = [gap for one in seen for gap in one.gaps_s]
    firsts = [one.ttft_s for one in seen if one.error is None]
    return {
        "requests": len(seen),
        "failed": {one.name: one.error for one in seen if one.error is not None},
        "retracted": {one.name: one.retractions for one in seen if one.retractions},
        "hit_rate": round(sum(one.cached_tokens for one in seen) / prompts, 4) if prompts else 0.0,
        "decode_ms": round(1e3 * statistics.median(gaps), 3) if gaps else None,
        "ttft_ms": round(1e3 * statistics.median(firsts), 1) if firsts else None,
    }


def peak(log: str) -> int:
    """Most slots that requests held at once, by SGLang's own lines of each prefill and decode step
    (pure)."""
    return max((int(found) for found in re.findall(r"#token: (\d+)", log)), default=0)

"""A trace of requests sent at its own times, whatever the server does (open loop)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import load as bench_load
from sglang_harli.simulation import trace_files, traces
from sglang_harli.simulation.traces import Trace, TraceRequest

SEED = 3
MOST_ROWS = 4000  # that are read of a file


@dataclass
class Sent:
    """What became of requests; ``seen`` in their order, None for one that failed or did not end in
    time."""

    seen: list[bench_load.Seen | None]
    began_s: float = 0.0  # time.monotonic, as ended_s
    ended_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


def published(path: Path | None, **synthetic: float) -> Trace:
    """The published trace from its file; without one a trace of the same statistics, of
    ``synthetic`` as ``traces.generate`` takes it."""
    if path is not None and path.exists():
        return trace_files.read(path, limit=MOST_ROWS)
    made = traces.generate(traces.CONVERSATION, seed=SEED, **synthetic)
    return Trace(f"{made.name} (synthetic: the statistics of the published one)", made.requests)


def send(url: str, requests: Sequence[TraceRequest], vocab: int, wait_s: float) -> Sent:
    """Send them at their times; one that has not ended ``wait_s`` after the last arrival is given
    up."""
    sent = Sent([None] * len(requests), time.monotonic())
    threads = []

    def one(number: int, request: TraceRequest) -> None:
        rng = random.Random(f"replay-{number}")
        prompt = [rng.randrange(10, vocab) for _ in range(request.prompt_tokens)]
        try:
            sent.seen[number] = bench_load.stream(url, prompt, request.output_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            sent.failures.append(f"{type(error).__name__}: {error}")

    for number, request in enumerate(requests):
        time.sleep(max(0.0, sent.began_s + request.arrival_s - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(number, request), daemon=True))
        threads[-1].start()
    end = time.monotonic() + wait_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    sent.ended_s = time.monotonic()
    return sent

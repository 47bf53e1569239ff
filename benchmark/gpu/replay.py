"""A trace of requests sent at its own times, whatever the server does (open loop)."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import load as bench_load
from sglang_harli.simulation import trace_files, traces
from sglang_harli.simulation.traces import Trace, TraceRequest

SEED = 3
WAIT_S = 20.0  # for requests that are under way when the window ends


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; ``ttft_s`` None: none."""

    tpot_s: float
    ttft_s: float | None = None


def requests_for(
    path: Path | None, *, mean_batch: float, tpot_s: float, seconds: float, most_tokens: int
) -> tuple[str, list[TraceRequest]]:
    """The name of the trace and its first ``seconds``, at a rate of ``mean_batch``.

    Args:
        path: a file of the published trace; None, or not there: one of the same statistics.
        mean_batch: tokens offered per second times ``tpot_s`` (``Trace.mean_batch``).
        most_tokens: prompt and output together; what is longer is cut.
    """
    if path is not None and path.exists():
        trace = trace_files.read(path, limit=4000)
        factor = trace.mean_batch(tpot_s) / mean_batch
        trace = Trace(
            trace.name,
            tuple(
                TraceRequest(r.arrival_s * factor, r.prompt_tokens, r.output_tokens) for r in trace.requests
            ),
        )
        name = f"{path.name}, its times by {factor:.3g}"
    else:
        trace = traces.generate(
            traces.CONVERSATION, seed=SEED, duration_s=seconds, mean_batch=mean_batch, tpot_s=tpot_s
        )
        name = f"{trace.name} (synthetic: the statistics of the published one)"
    return name, [_cut(r, most_tokens) for r in trace.requests if r.arrival_s < seconds]


def _cut(request: TraceRequest, most_tokens: int) -> TraceRequest:
    output = max(2, min(request.output_tokens, most_tokens // 2))
    prompt = max(1, min(request.prompt_tokens, most_tokens - output))
    return TraceRequest(request.arrival_s, prompt, output)


def replay(url: str, requests: list[TraceRequest], vocab: int, targets: Targets) -> dict[str, Any]:
    """Send them at their times; what they saw, against the targets.  A request that fails, or has
    not ended ``WAIT_S`` after the last arrival and its own target, is late."""
    seen: list[bench_load.Seen | None] = [None] * len(requests)
    failures: list[str] = []
    began = time.perf_counter()

    def send(number: int, request: TraceRequest) -> None:
        rng = random.Random(f"replay-{number}")
        prompt = [rng.randrange(10, vocab) for _ in range(request.prompt_tokens)]
        try:
            seen[number] = bench_load.stream(url, prompt, request.output_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(f"{type(error).__name__}: {error}")

    threads = []
    for number, request in enumerate(requests):
        time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
        threads.append(threading.Thread(target=send, args=(number, request), daemon=True))
        threads[-1].start()
    longest = max((r.output_tokens for r in requests), default=0) * targets.tpot_s
    end = time.perf_counter() + WAIT_S + longest
    for thread in threads:
        thread.join(max(0.0, end - time.perf_counter()))
    wall_s = time.perf_counter() - began
    return figures(list(seen), targets, wall_s) | {"failed": len(failures), "first failure": failures[:1]}


def figures(seen: list[bench_load.Seen | None], targets: Targets, wall_s: float) -> dict[str, Any]:
    """Of requests, None for one that did not end (pure)."""
    ended = [one for one in seen if one is not None]
    kept = sum(one.tpot_s <= targets.tpot_s for one in ended)
    first = sum(targets.ttft_s is None or one.ttft_s <= targets.ttft_s for one in ended)
    found: dict[str, Any] = {"requests": len(seen), "late or failed": len(seen) - len(ended)}
    if not seen or not ended:
        return found | {"within_target": 0.0 if seen else None}
    summary = bench_load.summary(ended, wall_s)
    return found | {
        "within_target": kept / len(seen),
        "first_in_time": first / len(seen),
        "tpot_ms": summary["tpot_ms"],
        "ttft_ms": summary["ttft_ms"],
        "decode_tokens_per_s": summary["decode_tokens_per_s"],
    }

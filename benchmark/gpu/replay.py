"""The conversation trace at a rate, and how its requests kept their targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import load as bench_load
from common.replay import published, send
from sglang_harli.simulation.traces import TraceRequest

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
    trace = published(path, duration_s=seconds, mean_batch=mean_batch, tpot_s=tpot_s)
    name, factor = trace.name, 1.0
    if path is not None and path.exists():
        factor = trace.mean_batch(tpot_s) / mean_batch
        name = f"{path.name}, its times by {factor:.3g}"
    moved = [TraceRequest(r.arrival_s * factor, r.prompt_tokens, r.output_tokens) for r in trace.requests]
    return name, [_cut(r, most_tokens) for r in moved if r.arrival_s < seconds]


def _cut(request: TraceRequest, most_tokens: int) -> TraceRequest:
    output = max(2, min(request.output_tokens, most_tokens // 2))
    prompt = max(1, min(request.prompt_tokens, most_tokens - output))
    return TraceRequest(request.arrival_s, prompt, output)


def replay(url: str, requests: list[TraceRequest], vocab: int, targets: Targets) -> dict[str, Any]:
    """Send them at their times; what they saw, against the targets.  A request that fails, or has
    not ended ``WAIT_S`` after the last arrival and its own target, is late."""
    longest = max((r.output_tokens for r in requests), default=0) * targets.tpot_s
    sent = send(url, requests, vocab, WAIT_S + longest)
    failed = {"failed": len(sent.failures), "first failure": sent.failures[:1]}
    return figures(list(sent.seen), targets, sent.seconds) | failed


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

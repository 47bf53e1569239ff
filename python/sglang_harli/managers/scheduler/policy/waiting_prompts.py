"""TTFT deadlines of the prompts that wait in SGLang's scheduler, read on its thread without a copy.

Leans on SGLang's Req, by attribute: origin_input_ids, output_ids, prefix_indices, extend_range,
sampling_params, time_stats.scheduler_recv_time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sglang_harli.managers.scheduler.policy.slo_ledger import Backlog
from sglang_harli.predictor.latency_predictor import LatencyPredictor

MOST = 32  # prompts that are looked at; where more wait, training stops


def note_arrivals(reqs: Iterable[Any], last_poll_s: float) -> None:
    """Note the earliest possible arrival of prompts just received: the last look at the sockets."""
    for req in reqs:
        req.harli_arrived_s = last_poll_s


def batch_seat_waits(running: Iterable[Any], count: int) -> list[int]:
    """Decode steps until the first, second, ... place is free at the latest; at most ``count``."""
    left = sorted(req.sampling_params.max_new_tokens - len(req.output_ids) for req in running)
    return left[:count]


def backlog_of(
    predictor: LatencyPredictor,
    waiting: Sequence[Any],
    chunked: Any,
    *,
    chunk_tokens: int | None,
    in_flight: bool = False,
    slots_s: Sequence[float] | None = None,
) -> Backlog | None:
    """What waits, or None where training must stop for it.

    Training stops for more than ``MOST`` prompts, for a retracted one (its tokens are due, and it
    has had its first), and for one whose wait for a place has no bound.

    Args:
        waiting: SGLang's waiting queue; chunked: the request whose prompt is computed in chunks.
        chunk_tokens: most tokens of one prefill; None: no limit.
        in_flight: the chunk that was launched last may not be computed yet.
        slots_s: upper bounds of the seconds until places are free; None: the prefill takes all.
    """
    if len(waiting) > MOST or (slots_s is not None and len(slots_s) < len(waiting)):
        return None
    tokens, pairs, since_s = 0, 0, math.inf
    if chunked is not None:
        total = len(chunked.origin_input_ids) + len(chunked.output_ids)
        done = chunked.extend_range.start if in_flight else chunked.extend_range.end
        if chunked.output_ids:
            return None
        tokens, pairs, since_s = total - done, (total - done) * total, _arrived_s(chunked)
    for n, req in enumerate(waiting):
        if req.output_ids:
            return None
        total = len(req.origin_input_ids)
        new = max(total - len(req.prefix_indices), 1)
        tokens += new
        pairs += new * total
        since_s = min(since_s, _arrived_s(req) - (0.0 if slots_s is None else slots_s[n]))
    parts = 1 if chunk_tokens is None else max(math.ceil(tokens / chunk_tokens), 1)
    upper_s = parts * predictor.prefill(math.ceil(tokens / parts), math.ceil(pairs / parts)).upper_s
    count = len(waiting) + (chunked is not None)
    return Backlog(count, since_s, upper_s, admitted=slots_s is None)


def _arrived_s(req: Any) -> float:
    # SGLang notes when the scheduler takes a message, which may have lain in the socket a turn.
    return getattr(req, "harli_arrived_s", 0.0) or req.time_stats.scheduler_recv_time

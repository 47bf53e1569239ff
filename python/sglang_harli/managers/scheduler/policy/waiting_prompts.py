"""TTFT deadlines of the prompts that wait in SGLang's scheduler, read on its thread without a copy.

Leans on SGLang's Req, by attribute: origin_input_ids, output_ids, sampling_params,
time_stats.scheduler_recv_time, and those of sglang_versions' requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_harli.managers.scheduler.policy.slo_ledger import Backlog
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.sglang_versions.current import requests

MOST = 32  # prompts that are looked at; where more wait, training stops


@dataclass(frozen=True, slots=True)
class DecodeRounds:
    """Decode rounds that SGLang puts behind each prefill, where more prompts wait.

    Attributes:
        left, between: most that come before the next prefill, and between two.
        step_s: upper bound of a decode step after so many more.
    """

    left: int = 0
    between: int = 0
    step_s: Callable[[int], float] = lambda _rounds: 0.0

    def seconds(self, prefills: int) -> float:
        """Upper bound of those before the last of so many prefills."""
        rounds = self.left + self.between * (prefills - 1)
        return rounds * self.step_s(rounds) if rounds else 0.0

    def spaced(self, steps: Iterable[int]) -> list[int]:
        """Decode steps until each prompt's prefill, where its place is free after ``steps``."""
        found: list[int] = []
        for step in steps:
            found.append(max(step, found[-1] + self.between if found else self.left))
        return found


NO_ROUNDS = DecodeRounds()


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
    slots_s: Sequence[float] | None = None,
    rounds: DecodeRounds = NO_ROUNDS,
) -> Backlog | None:
    """What waits, or None where training must stop for it.

    Training stops for more than ``MOST`` prompts, for a retracted one (its tokens are due, and it
    has had its first), and for one whose wait for a place has no bound.

    Args:
        waiting: SGLang's waiting queue; chunked: the request whose prompt is computed in chunks,
            of which the one that was launched last does not count.
        chunk_tokens: most tokens of one prefill; None: no limit.
        slots_s: upper bounds of the seconds until places are free, rounds that are left included;
            None: the next prefills take all.
        rounds: decode rounds before and between prefills.
    """
    if len(waiting) > MOST or (slots_s is not None and len(slots_s) < len(waiting)):
        return None
    tokens, pairs, since_s = 0, 0, math.inf
    if chunked is not None:
        total = len(chunked.origin_input_ids) + len(chunked.output_ids)
        done = requests.prefilled(chunked)
        if chunked.output_ids:
            return None
        tokens, pairs, since_s = total - done, (total - done) * total, arrived_s(chunked)
    for n, req in enumerate(waiting):
        if req.output_ids:
            return None
        total = len(req.origin_input_ids)
        new = max(total - requests.cached(req), 1)
        tokens += new
        pairs += new * total
        since_s = min(since_s, arrived_s(req) - (0.0 if slots_s is None else slots_s[n]))
    parts = 1 if chunk_tokens is None else max(math.ceil(tokens / chunk_tokens), 1)
    upper_s = parts * predictor.prefill(math.ceil(tokens / parts), math.ceil(pairs / parts)).upper_s
    count = len(waiting) + (chunked is not None)
    if slots_s is not None:
        rounds = replace(rounds, left=0)
    admitted = slots_s is None and not rounds.left
    return Backlog(count, since_s, upper_s, admitted, rounds.seconds(parts))


def arrived_s(req: Any) -> float:
    """When a request came, at the earliest."""
    # SGLang notes when the scheduler takes a message, which may have lain in the socket a turn.
    return getattr(req, "harli_arrived_s", 0.0) or req.time_stats.scheduler_recv_time

"""Deadlines and slack of the running batch (docs/internals/policy.md). Pure: no torch, no SGLang.

A request's token ``n`` (from 0) is due at ``first_token + n * TPOT target``: TPOT is a mean over
the request, so one that is ahead of its target has banked time that training may spend. All times
are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

# Kept of the target for what a client sees and the scheduler does not (detokenization, HTTP, jitter
# of other processes): a share of each token's time, and once the gap around the last token.
KEPT_SHARE = 0.03
KEPT_S = 0.002
IDLE_SEEN_S = 2.0  # where nothing was served within this time, there will be such time again
QUIET_SEEN = 0.1  # weight of the newest span between two new requests
HELD_UP = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32)  # decode steps over which hold-ups are added up
ENOUGH_S = 1e6  # a decode step that leaves so much makes up for any hold-up


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets in seconds, and the bounds of one quantum."""

    tpot_s: float
    ttft_s: float | None
    max_itl_s: float | None
    busy_quantum_s: float
    idle_quantum_s: float


class RequestProgress(Protocol):
    """What the ledger reads of a running request: see ``PlainProgress``."""

    @property
    def first_token_s(self) -> float: ...
    @property
    def last_token_s(self) -> float: ...
    @property
    def emitted(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlainProgress:
    """One running request: when its first and its latest token went out, and how many did."""

    first_token_s: float
    last_token_s: float
    emitted: int


@dataclass(frozen=True, slots=True)
class Slack:
    """What may be spent before the next decode step starts.

    Attributes:
        seconds: the least over the batch, after the decode step, the reserve and queued training.
        bound: the tightest promise (``tpot``, ``itl`` or ``ttft``), for the reason shown.
        later_quantum_s: the longest quantum that may fit later, if training waits (``expecting``).
        decode_penalty_s: how much longer the next decode step is after any training.
        idle_comes: training waits for idle time, so that nothing is to fit later.
        slack_gain_s: what a decode step without training adds to ``seconds``; 0 or less: nothing.
    """

    seconds: float
    bound: str
    later_quantum_s: float = float("-inf")
    decode_penalty_s: float = 0.0
    idle_comes: bool = False
    slack_gain_s: float = 0.0


UNBOUNDED = Slack(float("inf"), "none")


def batch_slack(
    clocks: Iterable[RequestProgress],
    targets: Targets,
    *,
    now_s: float,
    decode_upper_s: float,
    reserve_s: float,
    queued_s: float = 0.0,
    prefill_s: float = 0.0,
) -> Slack:
    """The slack of a running batch behind a step; ``UNBOUNDED`` for an empty batch.

    Args:
        clocks: the running requests that are not finished.
        decode_upper_s: upper bound of the next decode step; 0: the time that this step may take.
        reserve_s: kept back for prefills that arrive while the batch runs; delays when training
            starts to spend a request's lead, and takes nothing from the steady state.
        queued_s: training launched on the device and not finished (0 on a CPU).
        prefill_s: upper bound of prefills that are known to come before the next decode step.
    """
    tpot, itl = targets.tpot_s * (1 - KEPT_SHARE), targets.max_itl_s
    reserve_s += KEPT_S
    least, bound = float("inf"), "none"
    for clock in clocks:
        due = clock.first_token_s + clock.emitted * tpot - reserve_s
        if due < least:
            least, bound = due, "tpot"
        if itl is not None and clock.last_token_s + itl < least:
            least, bound = clock.last_token_s + itl, "itl"
    if bound == "none":
        return UNBOUNDED
    return Slack(least - now_s - decode_upper_s - queued_s - prefill_s, bound)


def spare(targets: Targets, decode_s: float) -> float:
    """What such a decode step leaves of the TPOT target, in seconds; may be negative."""
    return targets.tpot_s * (1 - KEPT_SHARE) - decode_s


def expecting(
    slack: Slack,
    targets: Targets,
    *,
    decode_s: float,
    steps_between_prefills: float,
    decode_penalty_s: float,
    idle_comes: bool,
) -> Slack:
    """The slack with what may fit later.

    Where idle time comes now and then, training waits for it, unless as much as its longest quantum
    takes is banked. Otherwise each decode step alone adds what it leaves of the TPOT target, until
    a new request comes with nothing banked; half of the usual time until then is counted on.

    Args:
        decode_s: a decode step without training before it; decode_penalty_s: see ``Slack``.
        steps_between_prefills: decode steps that usually pass between two new requests.
        idle_comes: there was idle time lately.
    """
    slack_gain_s = spare(targets, decode_s)
    if idle_comes and slack.seconds < targets.idle_quantum_s:
        return replace(slack, decode_penalty_s=decode_penalty_s, idle_comes=True, slack_gain_s=slack_gain_s)
    if slack.bound != "tpot" or slack_gain_s <= 0:
        return slack
    later_quantum_s = min(slack.seconds + slack_gain_s * steps_between_prefills / 2, targets.busy_quantum_s)
    return replace(
        slack, later_quantum_s=later_quantum_s, decode_penalty_s=decode_penalty_s, slack_gain_s=slack_gain_s
    )


@dataclass(frozen=True, slots=True)
class Backlog:
    """Prompts that wait for their first token, with a TTFT target.

    Attributes:
        since_s: arrival of the longest-waiting one, less what it may still wait for a place.
        prefill_upper_s: upper bound of computing all of them.
        admitted: a prefill that takes them is next; otherwise decode steps come first.
        rounds_s: upper bound of the decode rounds that SGLang puts before and between the prefills.
    """

    prompts: int
    since_s: float
    prefill_upper_s: float
    admitted: bool
    rounds_s: float = 0.0


def backlog_slack(
    backlog: Backlog,
    targets: Targets,
    *,
    now_s: float,
    decode_upper_s: float,
    reserve_s: float,
    queued_s: float = 0.0,
) -> Slack:
    """What may be spent before the first waiting prompt is due; -inf without a TTFT target.

    All of them are charged to each, since prompts that are computed together get their first tokens
    together. ``reserve_s`` is for those that come meanwhile.
    """
    if targets.ttft_s is None:
        return Slack(float("-inf"), "ttft")
    due = backlog.since_s + targets.ttft_s * (1 - KEPT_SHARE) - KEPT_S
    takes_s = backlog.prefill_upper_s + backlog.rounds_s
    return Slack(due - now_s - takes_s - decode_upper_s - reserve_s - queued_s, "ttft")


class PrefillReserve:
    """How far prefills of new requests put a running batch behind: kept from what it has banked.

    Prompts one after the other hold it up further than one, and the decode steps between them make
    up for some of that. So kept are decaying maxima of the hold-ups within 1, 2, 3, 4, 6 ... decode
    steps; consecutive prefill batches are one hold-up, since a running request feels their sum.
    """

    def __init__(self, half_life_s: float = 60.0) -> None:
        self.half_life_s = half_life_s
        self._recent = deque([0.0] * HELD_UP[-1], HELD_UP[-1])  # of each decode step, the latest first
        self._levels = [0.0] * len(HELD_UP)
        self._at = 0.0
        self._open = 0.0

    def prefill(self, seconds: float) -> None:
        """A prefill batch ran while others were decoding."""
        self._open += seconds

    def decode(self, now_s: float) -> None:
        """A decode step ran: the hold-up before it, if any, is over."""
        self._recent.appendleft(self._open)
        if self._open:
            fade, sums = self._fade(now_s), list(accumulate(self._recent))
            self._levels = [
                max(level * fade, sums[span - 1]) for level, span in zip(self._levels, HELD_UP, strict=True)
            ]
            self._at, self._open = now_s, 0.0

    def seconds(self, now_s: float, spare_s: float = ENOUGH_S) -> float:
        """Seconds to keep; ``spare_s`` of each decode step (``spare``) makes up for hold-ups."""
        if not self._levels[0]:
            return 0.0
        spare_s = max(spare_s, 0.0)
        behind = (level - (span - 1) * spare_s for level, span in zip(self._levels, HELD_UP, strict=True))
        return max(behind) * self._fade(now_s)

    def _fade(self, now_s: float) -> float:
        return 0.5 ** ((now_s - self._at) / self.half_life_s)


class QuietSteps:
    """Decode steps between two prefills of new requests: a running mean, or more while quiet."""

    def __init__(self, first: float = 8.0) -> None:
        self._mean = first
        self._since = 0

    def prefill(self) -> None:
        """A prefill batch ran; those right behind one another count once."""
        if self._since:
            self._mean += QUIET_SEEN * (self._since - self._mean)
            self._since = 0

    def decode(self) -> None:
        self._since += 1

    @property
    def steps(self) -> float:
        return max(self._mean, self._since)


class Attainment:
    """Requests that met the TPOT target, counted as they finish."""

    def __init__(self) -> None:
        self.finished = 0
        self.met = 0

    def count(self, clock: RequestProgress, tpot_s: float) -> None:
        self.finished += 1
        steps = clock.emitted - 1
        self.met += steps <= 0 or clock.last_token_s - clock.first_token_s <= steps * tpot_s

    def miss(self) -> None:
        """One finished of which it is not known whether it met the target."""
        self.finished += 1

    @property
    def share(self) -> float:
        return self.met / self.finished if self.finished else 1.0

"""Whether waiting for better quanta trains as much as taking whatever fits. Pure.

Waiting (``qos_policy``: for a larger size, for idle time) is a guess about arrivals that may never
come true: at even intervals the larger quantum is always about to fit. So what would have run
without waiting is counted too; where that was more, training stops waiting until it catches up.
"""

from __future__ import annotations

from sglang_harli.core import QuantumOffer
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack

KEEPS = 0.9  # of what taking whatever fits would have done: below that nothing is waited for
HALF_LIFE_S = 15.0  # of what is remembered: some hundred prompts of a server that is half busy


class WaitingPays:
    """Compares what runs beside requests with what could have.

    Work counts by the time that it takes in the best of the sizes on offer, so short quanta count
    for less. What could have run is held against the same slack, less what it would have spent
    since the last prompt, which has nothing banked and so ends all that. That serving would have
    been over later is left out: requests that take longer share more decode steps, and in
    simulations with arrivals of many kinds this comparison stays closest to what taking whatever
    fits really gets.
    """

    def __init__(self) -> None:
        self._done = self._could = 0.0
        self._debt_s = 0.0  # what could have run would have spent so much more of the slack than what ran
        self._debt_before_s = 0.0  # the boundary at hand
        self._at_s: float | None = None

    @property
    def pays(self) -> bool:
        """Whether training may wait."""
        return self._done >= KEEPS * self._could

    def begin(self) -> None:
        """A boundary between two steps of serving begins."""
        self._debt_before_s = self._debt_s

    def prefilled(self) -> None:
        """Prompts have been computed."""
        self._debt_s = 0.0

    def could(self, offer: QuantumOffer, slack: Slack, room_s: float, now_s: float) -> None:
        """A decision beside requests; ``room_s``: left of a quantum's bound between tokens."""
        limit_s = min(slack.seconds - self._debt_s, room_s - max(self._debt_s - self._debt_before_s, 0.0))
        least_s = offer.candidates[0][1]
        if least_s > limit_s:
            return
        self._fade(now_s)
        best_s = _best_s(offer)
        while least_s <= limit_s:
            rows, upper_s = next(c for c in reversed(offer.candidates) if c[1] <= limit_s)
            count = max(int(limit_s / upper_s), 1) if upper_s > 0 else 1
            self._could += count * rows * best_s
            self._debt_s += count * (upper_s + slack.decode_penalty_s)
            limit_s -= count * upper_s
            if not upper_s:
                return

    def ran(self, offer: QuantumOffer, rows: int, slack: Slack) -> None:
        """A quantum of so many rows was chosen beside requests."""
        self._done += rows * _best_s(offer)
        self._debt_s -= dict(offer.candidates)[rows] + slack.decode_penalty_s

    def ran_idle(self, offer: QuantumOffer, rows: int, now_s: float) -> None:
        """A quantum was chosen while nothing was served: it would have run anyway."""
        self._fade(now_s)
        self._debt_s = 0.0
        work_s = rows * _best_s(offer)
        self._done += work_s
        self._could += work_s

    def _fade(self, now_s: float) -> None:
        if self._at_s is not None:
            kept = 0.5 ** ((now_s - self._at_s) / HALF_LIFE_S)
            self._done *= kept
            self._could *= kept
        self._at_s = now_s


def _best_s(offer: QuantumOffer) -> float:
    """Time per row in the size that has the least of it."""
    return min(upper_s / rows for rows, upper_s in offer.candidates)

"""How far an upper bound lies above the expectation: a quantile of recent residuals.  Pure floats.

Split conformal prediction on a sliding window: the residual is taken that a new one exceeds with
the wanted probability, whatever the distribution.  Where that drifts, hits and misses steer the
probability itself (adaptive conformal inference, Gibbs and Candès, NeurIPS 2021), so that coverage
is held.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

WINDOW = 300
COVERAGE = 0.99
STEERING = 0.003
LEAST_MISS, MOST_MISS = 0.002, 0.015
FLOOR = 1.01
CAP = 4.0  # a bound above this says nothing; what takes longer is an accident
PRIOR_RATIO = 2.0
_FEW = 8.0  # observations that the prior ratio counts as
_ENOUGH = 99  # from here on the window has a residual for the wanted quantile


class Margin:
    """``ratio`` of upper bound to expectation of one phase."""

    def __init__(self, prior_ratio: float = PRIOR_RATIO) -> None:
        self._prior = prior_ratio
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._miss = 1.0 - COVERAGE
        self.ratio = prior_ratio

    @property
    def seen(self) -> int:
        """Observations in the window."""
        return len(self._recent)

    def observe(self, score: float) -> None:
        """A step took ``score`` times its expectation (less what the bound added for doubt)."""
        missed = score > self.ratio
        self._miss = min(max(self._miss + STEERING * (1.0 - COVERAGE - missed), LEAST_MISS), MOST_MISS)
        self._recent.append(score)
        insort(self._sorted, score)
        if len(self._recent) > WINDOW:
            old = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, old)]
        self._set()

    def rescale(self, count: int, factor: float) -> None:
        """The expectation is corrected by ``factor``, from the latest ``count`` observations."""
        recent = list(self._recent)
        start = max(len(recent) - count, 0)
        recent[start:] = [score / factor for score in recent[start:]]
        self._recent = deque(recent)
        self._sorted = sorted(recent)
        self._miss = 1.0 - COVERAGE
        self._set()

    def _set(self) -> None:
        count = len(self._sorted)
        if not count:
            self.ratio = self._prior
            return
        rank = math.ceil((1.0 - self._miss) * (count + 1))
        ratio = self._sorted[min(rank, count) - 1]
        if count < _ENOUGH:
            few = _FEW / (_FEW + count) - _FEW / (_FEW + _ENOUGH)
            ratio = max(ratio, 1.0) + (self._prior - 1.0) * few
        self.ratio = min(max(ratio, FLOOR), CAP)

"""One cost line with fit, margin and accuracy, in plain floats: a microsecond an estimate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sglang_harli.core import LatencyEstimate
from sglang_harli.predictor.line.accuracy import Accuracy
from sglang_harli.predictor.line.margin import CAP, Margin
from sglang_harli.predictor.line.recursive import CLAMP, TINY_S, Prior, RecursiveLine

KNOWN = 0.03  # a relative standard deviation of the expectation that the margin covers anyway
MOST_DOUBT = 1.0
LEVEL_KEPT = 0.97  # of the level, from one observation to the next
SETTLED = 16  # observations after which errors are not those of a bad first guess


class CostLine:
    """Expectation and upper bound of a time that is linear in two features, learnt by observing.

    Args:
        prior: the line before anything is observed.
        accuracy: counts this line's predictions; several lines of one phase share one.
        follows: how far the line's level goes with each observation, and then back: for times whose
            errors come in spells; 0: not at all.
    """

    def __init__(
        self,
        prior: Prior,
        accuracy: Accuracy | None = None,
        *,
        forgetting: float = 0.99,
        follows: float = 0.0,
    ) -> None:
        self.line = RecursiveLine(prior, forgetting=forgetting)
        self._follows, self._level = follows, 0.0  # the level is a logarithm
        self.margin = Margin()
        self.accuracy = Accuracy() if accuracy is None else accuracy

    @property
    def seen(self) -> int:
        return self.line.seen

    @property
    def settled(self) -> bool:
        """Whether errors say something about the machine, not about the first guess."""
        return self.line.seen >= SETTLED

    @property
    def _scale(self) -> float:
        return math.exp(self._level) if self._level else 1.0

    @property
    def ratio(self) -> float:
        """Upper bound over expectation where the line is well known."""
        return self.margin.ratio

    def expected(self, x1: float, x2: float) -> float:
        return self.line.expected(x1, x2) * self._scale

    def upper(self, x1: float, x2: float) -> float:
        """The bound widens where the line is extrapolated to what was never observed."""
        doubt = self.line.doubt(x1, x2) - KNOWN
        above = self.margin.ratio - 1.0
        if doubt > 0.0:
            above = min(above + min(doubt, MOST_DOUBT), CAP - 1.0)
        return self.line.expected(x1, x2) * self._scale * (1.0 + above)

    def uppers(self, x1: float, x2: float, counts: Iterable[int]) -> list[float]:
        """``upper(k * x1, k * x2)`` of each ``k``, rising with it: a part never takes longer than
        the whole, so a small size's bound, wide when long unseen, is cut to the larger's."""
        a, b, c, d, e = self.line.along(x1, x2)
        above, scale = self.margin.ratio - 1.0, self._scale
        plain = 1.0 + above
        bounds = []
        for k in counts:
            expected = max(a + b * k, TINY_S)
            variance, ratio = c + k * (d + e * k), plain
            if variance > (KNOWN * expected) ** 2:
                doubt = min(math.sqrt(variance) / expected - KNOWN, MOST_DOUBT)
                ratio = 1.0 + min(above + doubt, CAP - 1.0)
            bounds.append(expected * scale * ratio)
        for at in range(len(bounds) - 2, -1, -1):
            if bounds[at] > bounds[at + 1]:
                bounds[at] = bounds[at + 1]
        return bounds

    def estimate(self, x1: float, x2: float) -> LatencyEstimate:
        return LatencyEstimate(self.expected(x1, x2), self.upper(x1, x2))

    def observe(self, x1: float, x2: float, seconds: float) -> None:
        """A step at this load took ``seconds``."""
        if not 0.0 < seconds < float("inf"):
            return
        if self.line.seen:
            self.accuracy.count(self.expected(x1, x2), self.upper(x1, x2), seconds)
            doubt = min(max(self.line.doubt(x1, x2) - KNOWN, 0.0), MOST_DOUBT)
            ratio = seconds / (self.line.expected(x1, x2) * math.exp(self._level))
            self.margin.observe(ratio - doubt)
            if self._follows and self.settled:
                most = CLAMP * self.line.scatter
                self._level = LEVEL_KEPT * self._level + self._follows * min(
                    max(math.log(ratio), -most), most
                )
        change = self.line.observe(x1, x2, seconds)
        if change is not None:
            self.margin.rescale(*change)
            self._level = 0.0  # the line itself has moved

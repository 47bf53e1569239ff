"""How much longer than its line says a shape's first quantum takes: allocation, code paths.  Such a
run would mislead the line; it has a bound of its own, and is counted.  Pure floats."""

from __future__ import annotations

import math

from sglang_harli.predictor.line.accuracy import Accuracy
from sglang_harli.predictor.line.margin import Margin

STEP = 0.1  # of the way to the latest ratio, as a logarithm
BOUND = 1.0  # of a logarithm: no single run says more


class FirstRuns:
    """First runs of the shapes of one kind of quantum."""

    def __init__(self) -> None:
        self.accuracy = Accuracy()
        self._margin = Margin()
        self._level = 0.0  # mean logarithm of measured over the line's expectation

    @property
    def ratio(self) -> float:
        """Upper bound over the line's expectation."""
        return self._margin.ratio

    def observe(self, expected_s: float, seconds: float) -> None:
        """A first run was expected to take ``expected_s`` by the line, and took ``seconds``."""
        if not 0.0 < seconds < math.inf:
            return
        self.accuracy.count(expected_s * math.exp(self._level), expected_s * self._margin.ratio, seconds)
        ratio = seconds / expected_s
        self._margin.observe(ratio)
        self._level += STEP * min(max(math.log(ratio) - self._level, -BOUND), BOUND)

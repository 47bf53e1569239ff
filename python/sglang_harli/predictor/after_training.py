"""How much slower a decode step is right after training, which takes the caches.  Pure floats.

In turns the second stage of Harli's predictor is a sum, but not quite: the step that follows a
quantum finds its weights gone from the cache (docs/internals/predictor.md).
"""

from __future__ import annotations

import math

STEP = 0.02  # of the way to the latest step
BOUND = 0.3  # of a logarithm: no single step says more
MOST = 2.0


class AfterTraining:
    """The factor (from 1) of a step after training; other steps follow a level of their own, so
    that what makes all steps slower does not count."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._alone = 0.0  # of steps without training before them: mean logarithm of measured over expected

    def of(self, after_training: bool) -> float:
        """What to multiply a step's time with."""
        return self.factor if after_training else 1.0

    def observe(self, ratio: float, *, after_training: bool) -> None:
        """A step took ``ratio`` times what was expected of it, the factor included."""
        error = min(max(math.log(ratio), -BOUND), BOUND) - self._alone
        if after_training:
            self.factor = min(max(self.factor * math.exp(STEP * error), 1.0), MOST)
        else:
            self._alone += STEP * error

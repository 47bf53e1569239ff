"""Stage 1: what a decode step and a prefill take when serving has its share of the device alone.

Harli's latency predictor, in the form of the published prototype: per SM share ``s`` a line ``T1 =
c_s + beta_s * batch + kappa_s * (sum of context tokens)``, where a decode step that is replayed
from a CUDA graph counts with the graph's batch size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping

from sglang_harli.core import LatencyEstimate
from sglang_harli.predictor.after_training import AfterTraining
from sglang_harli.predictor.line.accuracy import Accuracy
from sglang_harli.predictor.line.cost_line import CostLine
from sglang_harli.predictor.line.recursive import Prior

WHOLE = 0  # the SM share of a device that is not split
FOLLOWS = 0.1  # how far the level of decode steps goes with each: what disturbs one disturbs the next


class Padding:
    """The batch size that a decode step computes.  ``sizes``: of the captured CUDA graphs; none:
    every batch is computed as it is."""

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        self.sizes = sorted(set(sizes))

    def __call__(self, batch: int) -> int:
        """The smallest graph that holds the batch; a larger batch runs without a graph."""
        at = bisect_left(self.sizes, batch)
        return self.sizes[at] if at < len(self.sizes) else batch


class SoloDecode:
    """Decode steps by SM share (``WHOLE``: the undivided device); ValueError: no share at all.
    ``after_training``: how much slower a step is that training ran before."""

    def __init__(
        self,
        priors: Mapping[int, Prior],
        padding: Padding | None = None,
        after_training: AfterTraining | None = None,
    ) -> None:
        if not priors:
            raise ValueError("a predictor needs a line for one SM share at least: give one for WHOLE")
        self.padding = Padding() if padding is None else padding
        self.accuracy = Accuracy()
        self.after_training = AfterTraining() if after_training is None else after_training
        self.lines = {
            share: CostLine(prior, self.accuracy, follows=FOLLOWS) for share, prior in sorted(priors.items())
        }
        self._shares = sorted(self.lines, key=lambda share: share or float("inf"))

    def line(self, share: int) -> tuple[CostLine, float]:
        """A share's line and the factor on it: that of the next smaller share that has one; below
        the smallest, time grows at most in proportion to the missing SMs."""
        known = self.lines.get(share)
        if known is not None:
            return known, 1.0
        wanted = share or float("inf")
        below = [level for level in self._shares if (level or float("inf")) <= wanted]
        if below:
            return self.lines[below[-1]], 1.0
        smallest = self._shares[0]
        return self.lines[smallest], smallest / share if smallest else 1.0

    def estimate(
        self, batch: int, context_tokens: int, share: int = WHOLE, *, after_training: bool = False
    ) -> LatencyEstimate:
        line, factor = self.line(share)
        factor *= self.after_training.of(after_training)
        return times(line.estimate(self.padding(batch), context_tokens), factor)

    def observe(
        self,
        batch: int,
        context_tokens: int,
        seconds: float,
        share: int = WHOLE,
        *,
        after_training: bool = False,
    ) -> float:
        """A step took ``seconds``; one of a share that has no line teaches nothing.  Returns what
        it would have taken with no training before it."""
        alone_s = seconds / self.after_training.of(after_training)
        line = self.lines.get(share)
        if line is not None and 0.0 < seconds < math.inf:
            x1 = self.padding(batch)
            if line.settled:
                self.after_training.observe(
                    alone_s / line.expected(x1, context_tokens), after_training=after_training
                )
            line.observe(x1, context_tokens, alone_s)
        return alone_s

    def slower(self, factor: float) -> SoloDecode:
        """Of steps that take about so many times as long: starts from what these lines are now."""
        priors = {}
        for share, line in self.lines.items():
            base, per_request, per_token = line.line.terms
            priors[share] = Prior((factor * base, factor * per_request, factor * per_token), 0.5, 0.3)
        return SoloDecode(priors, self.padding, AfterTraining(self.after_training.factor))


def times(estimate: LatencyEstimate, factor: float) -> LatencyEstimate:
    """An estimate that is so many times as long."""
    if factor == 1.0:
        return estimate
    return LatencyEstimate(estimate.expected_s * factor, estimate.upper_s * factor)


class SoloPrefill:
    """Prefills: a line in new tokens and in pairs of a new token and one it attends to."""

    def __init__(self, prior: Prior) -> None:
        self.line = CostLine(prior)

    def estimate(self, tokens: int, pairs: int | None = None) -> LatencyEstimate:
        """``pairs``: default tokens squared, as of one prompt without a cached prefix."""
        return self.line.estimate(tokens, tokens * tokens if pairs is None else pairs)

    def observe(self, tokens: int, seconds: float, pairs: int | None = None) -> None:
        self.line.observe(tokens, tokens * tokens if pairs is None else pairs, seconds)

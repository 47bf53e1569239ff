"""What training quanta take: a line per kind, in tokens and, with attention, in pairs of tokens.
Kinds that are not cut by rows (an optimizer slice, a tensor to copy) count as one token.

Where the host launches what a device computes, a line more per kind says what the launch takes of
the host: a quantum's price is the longer of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.predictor.doubt import Doubt
from sglang_harli.predictor.first_runs import FirstRuns
from sglang_harli.predictor.line.cost_line import CostLine
from sglang_harli.predictor.line.recursive import Prior

ATTENDING = frozenset({QuantumKind.FORWARD, QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT})
FORGETTING = 0.98
# Seconds in which the doubt of an estimate halves it: of one that was measured, which holds as long
# as the machine does not change, and of a guess, which may be tens of times too high.
HALF_LIFE_S = 30.0
GUESS_HALF_LIFE_S = 1.0
LAUNCH = Prior((1e-3, 1e-7, 0.0))  # a guess; nothing is priced by it before a launch was measured
CERTAIN = 0.1  # share of a time that may be the device's waiting for the host


class QuantumLines:
    """Cost lines of all kinds of quanta, by kind; ``firsts``: of the first run of a shape."""

    def __init__(self, priors: Mapping[QuantumKind, Prior]) -> None:
        self.lines = {kind: CostLine(priors[kind], forgetting=FORGETTING) for kind in QuantumKind}
        self.launches = {kind: CostLine(LAUNCH, forgetting=FORGETTING) for kind in QuantumKind}
        self.firsts = {kind: FirstRuns() for kind in QuantumKind}
        self._doubts = {kind: Doubt() for kind in QuantumKind}
        self._measured: set[QuantumKind] = set()  # by a run that was not the first of its shape

    def estimate(self, kind: QuantumKind, tokens: int, row_tokens: int) -> LatencyEstimate:
        """``row_tokens``: the padded length of one row, which its tokens attend to."""
        device, launches = self.device(kind, tokens, row_tokens), self.launches[kind]
        if not launches.seen:
            return device
        launch = launches.estimate(tokens, 0)
        return LatencyEstimate(max(device.expected_s, launch.expected_s), max(device.upper_s, launch.upper_s))

    def device(self, kind: QuantumKind, tokens: int, row_tokens: int) -> LatencyEstimate:
        """Of the device alone."""
        return self.lines[kind].estimate(tokens, _pairs(kind, tokens, row_tokens))

    def prices(
        self,
        kind: QuantumKind,
        sizes: Iterable[int],
        row_tokens: int,
        attended: int = 0,
        firsts: Iterable[bool] = (),
    ) -> tuple[tuple[int, float], ...]:
        """``(rows, upper bound in seconds)``, rising; see ``LatencyPredictor.prices``."""
        rows, tokens, line = tuple(sizes), row_tokens or 1, self.lines[kind]
        pairs = _pairs(kind, tokens, attended or row_tokens)
        uppers = line.uppers(tokens, pairs, rows)
        launches = self.launches[kind]
        if launches.seen:
            uppers = [max(pair) for pair in zip(uppers, launches.uppers(tokens, 0, rows), strict=True)]
        ratio = self.firsts[kind].ratio
        for at, first in enumerate(firsts):
            if first:
                count = rows[at]
                expected_s = line.expected(count * tokens, count * pairs)
                if launches.seen:
                    expected_s = max(expected_s, launches.expected(count * tokens, 0))
                uppers[at] = max(uppers[at], expected_s * ratio)
        return _rising(tuple(zip(rows, uppers, strict=True)))

    def observe(
        self, kind: QuantumKind, tokens: int, row_tokens: int, seconds: float, *, first_of_shape: bool
    ) -> None:
        """A quantum took ``seconds``; a shape's first run (allocation, code paths) has a bound of
        its own, unless nothing else is known."""
        line, pairs = self.lines[kind], _pairs(kind, tokens, row_tokens)
        if first_of_shape and line.seen:
            self.firsts[kind].observe(line.expected(tokens, pairs), seconds)
            return
        if not first_of_shape:
            self._measured.add(kind)
        line.observe(tokens, pairs, seconds)

    def observe_launch(
        self, kind: QuantumKind, tokens: int, row_tokens: int, launch_s: float, *, first_of_shape: bool
    ) -> None:
        """Its launch took ``launch_s`` of the host.  A shape's first one (kernels are loaded,
        memory is allocated) has the bound of first runs, unless nothing else is known."""
        launches = self.launches[kind]
        if not (first_of_shape and launches.seen):
            launches.observe(tokens, 0, launch_s)
            return
        expected_s = self.estimate(kind, tokens, row_tokens).expected_s
        if launch_s > expected_s:
            self.firsts[kind].observe(expected_s, launch_s)

    def alone(
        self, kind: QuantumKind, tokens: int, row_tokens: int, seconds: float, launch_s: float
    ) -> float | None:
        """What the device alone took of ``seconds`` in which it waited for the launch, as far as
        that can be said; None: it agrees with the estimate, and says no more."""
        line = self.lines[kind]
        if launch_s <= CERTAIN * seconds or not line.seen:
            return seconds
        expected_s = line.expected(tokens, _pairs(kind, tokens, row_tokens))
        least_s = seconds - launch_s
        if least_s <= expected_s <= seconds:
            return None
        return seconds if expected_s > seconds else least_s

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        """The estimate of ``kind`` alone holds training back."""
        half_life_s = HALF_LIFE_S if kind in self._measured else GUESS_HALF_LIFE_S
        self._doubts[kind].refused(now_s, half_life_s)

    def doubt(self, kind: QuantumKind) -> float:
        """What the price of the least quantum of ``kind`` may be multiplied with."""
        return self._doubts[kind].level

    def ran(self, kind: QuantumKind) -> None:
        """A quantum of ``kind`` has run: the next one is priced without doubt."""
        self._doubts[kind].ran()


def _rising(prices: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """Without sizes that cost more than a larger one: where it does not fit, they do not either."""
    kept, least_s = [], math.inf
    for rows, upper_s in reversed(prices):
        if upper_s <= least_s:
            kept.append((rows, upper_s))
            least_s = upper_s
    return tuple(reversed(kept))


def _pairs(kind: QuantumKind, tokens: int, row_tokens: int) -> int:
    return tokens * row_tokens if kind in ATTENDING else 0

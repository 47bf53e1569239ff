"""What training quanta take: a line per kind, in tokens and, for the kinds with attention, in pairs of tokens.

Kinds that are not cut by rows (an optimizer slice, a tensor to copy) count as one token: their line is a level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.predictor.cost_line import CostLine
from sglang_harli.predictor.recursive import Prior

ATTENDING = frozenset({QuantumKind.FORWARD, QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT})
FORGETTING = 0.98


class QuantumLines:
    """Cost lines of all kinds of quanta.

    Args:
        priors: of every kind.
        half_life_s: how fast an estimate that alone holds training back is doubted.
    """

    def __init__(self, priors: Mapping[QuantumKind, Prior], *, half_life_s: float = 30.0) -> None:
        self.half_life_s = half_life_s
        self.lines = {kind: CostLine(priors[kind], forgetting=FORGETTING) for kind in QuantumKind}

    def estimate(self, kind: QuantumKind, tokens: int, row_tokens: int) -> LatencyEstimate:
        """``row_tokens``: the padded length of one row, which its tokens attend to."""
        return self.lines[kind].estimate(tokens, _pairs(kind, tokens, row_tokens))

    def prices(
        self, kind: QuantumKind, sizes: Iterable[int], row_tokens: int, attended: int = 0
    ) -> tuple[tuple[int, float], ...]:
        """``(rows, upper bound in seconds)`` of each size, rising, as a QuantumOffer's candidates.

        Args:
            attended: tokens that each attends to, where it is not ``row_tokens``.
        """
        rows, tokens = tuple(sizes), row_tokens or 1
        uppers = self.lines[kind].uppers(tokens, _pairs(kind, tokens, attended or row_tokens), rows)
        return tuple(zip(rows, uppers, strict=True))

    def observe(
        self,
        kind: QuantumKind,
        tokens: int,
        row_tokens: int,
        seconds: float,
        *,
        now_s: float,
        first_of_shape: bool,
    ) -> None:
        """A quantum took ``seconds``; a shape's first run (allocation, code paths) is left out unless nothing else
        is known."""
        line = self.lines[kind]
        if first_of_shape and line.seen:
            return
        line.observe(tokens, _pairs(kind, tokens, row_tokens), seconds, now_s)

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        self.lines[kind].relax(now_s, self.half_life_s)


def _pairs(kind: QuantumKind, tokens: int, row_tokens: int) -> int:
    return tokens * row_tokens if kind in ATTENDING else 0

"""Stage 2: what a decode step takes while training runs beside it on other SMs.

``T2 = T1 * (1 + rho_{s,phase} * f)`` with ``f`` the SMs that training has, as published, and one
``rho`` for each kind of quantum: forward and backward press the memory bus differently.  Where
training takes turns with decode (temporal slotting) the co-run is the sum of step and quanta.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.predictor.line.accuracy import Accuracy
from sglang_harli.predictor.line.margin import Margin

PRIOR_RHO = 0.0065  # per SM: the largest that was published for an RTX 6000 Ada
FORGETTING = 0.99
PRIOR_WEIGHT = 4.0  # observations that the prior counts as
CLAMP = 0.5  # one step moves the fit by at most that much of T1


class Slowdown:
    """``rho`` of one SM share and one kind of quantum: least squares with forgetting."""

    def __init__(self, rho: float = PRIOR_RHO, *, sms: int = 32) -> None:
        self.margin = Margin()
        self._weight = PRIOR_WEIGHT * sms * sms
        self._moment = self._weight * rho

    @property
    def rho(self) -> float:
        """Slowdown per SM that training has; never below 0."""
        return max(self._moment / self._weight, 0.0)

    def factor(self, finetune_sms: int) -> float:
        return 1.0 + self.rho * finetune_sms

    def observe(self, solo_s: float, finetune_sms: int, seconds: float) -> None:
        expected = self.factor(finetune_sms)
        residual = seconds / solo_s - expected
        self.margin.observe((expected + residual) / expected)
        share = expected - 1.0 + min(max(residual, -CLAMP), CLAMP)
        self._weight = self._weight * FORGETTING + finetune_sms * finetune_sms
        self._moment = self._moment * FORGETTING + finetune_sms * share


class CoRun:
    """Slowdowns by SM share and kind of quantum; ``priors``: known ``rho`` by ``(share, kind)``."""

    def __init__(self, priors: Mapping[tuple[int, QuantumKind], float] | None = None) -> None:
        self._priors = dict(priors or {})
        self._known: dict[tuple[int, QuantumKind], Slowdown] = {}
        self.accuracy = {kind: Accuracy() for kind in QuantumKind}

    def slowdown(self, share: int, kind: QuantumKind) -> Slowdown:
        key = (share, kind)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Slowdown(self._priors.get(key, PRIOR_RHO))
        return found

    def estimate(
        self, solo: LatencyEstimate, share: int, finetune_sms: int, kind: QuantumKind
    ) -> LatencyEstimate:
        """A decode step beside a quantum of ``kind``; its bound is the wider of the two margins."""
        if not finetune_sms:
            return solo
        slowdown = self.slowdown(share, kind)
        factor = slowdown.factor(finetune_sms)
        ratio = max(slowdown.margin.ratio, solo.upper_s / solo.expected_s)
        expected = solo.expected_s * factor
        return LatencyEstimate(expected, expected * ratio)

    def ratio(self, kind: QuantumKind) -> float:
        """The widest margin of this kind over the shares that were used; 1 before any."""
        return max((s.margin.ratio for (_, k), s in self._known.items() if k is kind), default=1.0)

    def observe(
        self, solo: LatencyEstimate, share: int, finetune_sms: int, kind: QuantumKind, seconds: float
    ) -> None:
        if not (finetune_sms and 0.0 < seconds < float("inf")):
            return
        beside = self.estimate(solo, share, finetune_sms, kind)
        self.accuracy[kind].count(beside.expected_s, beside.upper_s, seconds)
        self.slowdown(share, kind).observe(solo.expected_s, finetune_sms, seconds)

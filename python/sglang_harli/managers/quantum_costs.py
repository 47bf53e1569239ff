"""First estimates of what a decode step and a training quantum cost.  Pure: plain numbers.

Exponentially weighted, per kind of quantum a line in tokens, each with an upper bound taken from recent
relative errors.  The two-stage predictor (design section 7) takes their place behind the same calls.
"""

from __future__ import annotations

from typing import ClassVar

from sglang_harli.core import LatencyEstimate, QuantumKind

_KEEP = 0.97  # weight of the past per observation
_FLOOR = 1.15  # least ratio of upper bound to expectation
_PRIOR_RATIO = 2.0


class _Line:
    """seconds = base + slope * tokens, least squares with forgetting; both parts kept at or above 0."""

    def __init__(self, base_s: float, slope_s: float) -> None:
        self.base_s, self.slope_s = base_s, slope_s
        self.ratio = _PRIOR_RATIO  # upper bound over expectation
        self.error = (_PRIOR_RATIO - 1) / 4
        self.seen = 0
        self.last_s = 0.0
        self.discount = 1.0
        self._w = self._x = self._y = self._xx = self._xy = 0.0

    def expected(self, tokens: int) -> float:
        return (self.base_s + self.slope_s * tokens) * self.discount

    def observe(self, tokens: int, seconds: float, now_s: float) -> None:
        if self.seen >= 8:  # a preempted quantum says little about the next one
            seconds = min(seconds, 4 * self.expected(tokens))
        if self.seen:
            error = seconds / max(self.expected(tokens), 1e-9) - 1
            self.error += 0.1 * (abs(error) - self.error)
            self.ratio = max(_FLOOR, 1 + 3 * self.error, min(self.ratio * 0.995, 3.0), min(1 + error, 2.0))
        self.seen += 1
        self.last_s, self.discount = now_s, 1.0
        for name, value in (("_w", 1.0), ("_x", tokens), ("_y", seconds)):
            setattr(self, name, getattr(self, name) * _KEEP + value)
        self._xx = self._xx * _KEEP + tokens * tokens
        self._xy = self._xy * _KEEP + tokens * seconds
        self._fit()

    def _fit(self) -> None:
        mean_x, mean_y = self._x / self._w, self._y / self._w
        spread = self._xx / self._w - mean_x * mean_x
        if spread > 1e-3 * mean_x * mean_x + 1e-9:
            slope = (self._xy / self._w - mean_x * mean_y) / spread
            # a line through few sizes may tilt: keep both parts non-negative
            self.slope_s = min(max(slope, 0.0), mean_y / max(mean_x, 1.0))
            self.base_s = max(mean_y - self.slope_s * mean_x, 0.0)
            return
        # One size only: keep the line's shape (as the prior or the fit before had it), move its height.
        # Smaller sizes are then predicted at worst proportionally, larger ones never below proportion.
        scale = mean_y / max(self.base_s + self.slope_s * mean_x, 1e-12)
        self.base_s *= scale
        self.slope_s *= scale

    def relax(self, now_s: float, half_life_s: float) -> None:
        """Held back by this estimate alone: lower the bound to the expectation, and doubt an old expectation."""
        self.ratio = max(1.0, self.ratio * 0.98)
        if now_s > self.last_s:
            self.discount = 0.5 ** ((now_s - self.last_s) / half_life_s)


class QuantumCosts:
    """Cost lines of all kinds of quanta.

    Args:
        prior_token_s: a cautious first guess of one layer's forward for one token, seconds.
        half_life_s: how fast an estimate that alone holds training back is doubted.
    """

    _PRIOR_SHARE: ClassVar[dict[QuantumKind, float]] = {
        QuantumKind.EMBED: 0.1,
        QuantumKind.FORWARD: 1.0,
        QuantumKind.BACKWARD: 3.5,
        QuantumKind.HEAD: 4.0,
    }

    def __init__(self, prior_token_s: float, *, base_s: float = 2e-3, half_life_s: float = 30.0) -> None:
        self.half_life_s = half_life_s
        self._lines = {
            kind: _Line(base_s, prior_token_s * self._PRIOR_SHARE.get(kind, 0.0)) for kind in QuantumKind
        }

    def estimate(self, kind: QuantumKind, tokens: int) -> LatencyEstimate:
        line = self._lines[kind]
        expected = line.expected(tokens)
        return LatencyEstimate(expected, expected * line.ratio)

    def observe(
        self, kind: QuantumKind, tokens: int, seconds: float, *, now_s: float, first_of_shape: bool
    ) -> None:
        """A quantum of ``tokens`` tokens took ``seconds``; a shape's first run (allocation, code paths) is left out
        unless nothing else is known."""
        line = self._lines[kind]
        if first_of_shape and line.seen:
            return
        line.observe(tokens, seconds, now_s)

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        self._lines[kind].relax(now_s, self.half_life_s)

    def summary(self) -> dict[str, dict[str, float]]:
        """Per kind that has run: base and per-token milliseconds, ratio of the bound, runs seen."""
        return {
            kind.value: {
                "base_ms": round(line.base_s * 1e3, 4),
                "token_ms": round(line.slope_s * 1e3, 6),
                "upper_ratio": round(line.ratio, 3),
                "seen": line.seen,
            }
            for kind, line in self._lines.items()
            if line.seen
        }


class DecodeCosts:
    """Decode step time by batch size (next power of two), exponentially weighted, with an upper bound."""

    def __init__(self) -> None:
        self._mean: dict[int, float] = {}
        self._dev: dict[int, float] = {}

    @staticmethod
    def _bucket(batch_size: int) -> int:
        return 1 << max(batch_size - 1, 0).bit_length()

    def observe(self, batch_size: int, seconds: float) -> None:
        key = self._bucket(batch_size)
        mean = self._mean.get(key)
        if mean is None:
            self._mean[key], self._dev[key] = seconds, seconds / 4
            return
        seconds = min(seconds, 4 * mean)  # a step that was preempted for long says little about the next
        self._dev[key] += 0.1 * (abs(seconds - mean) - self._dev[key])
        self._mean[key] = mean + 0.1 * (seconds - mean)

    def estimate(self, batch_size: int) -> LatencyEstimate:
        """From the nearest size seen, scaled up in proportion at most; 20 ms before any."""
        if not self._mean:
            return LatencyEstimate(0.02, 0.04)
        key = self._bucket(batch_size)
        near = min(self._mean, key=lambda k: (abs(k.bit_length() - key.bit_length()), k))
        scale = max(1.0, key / near)
        mean = self._mean[near] * scale
        return LatencyEstimate(mean, mean * 1.05 + 3 * self._dev[near] * scale)

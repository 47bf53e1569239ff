"""How long training had work and did not run, by reason; a decision costs one comparison."""

from __future__ import annotations

from sglang_harli.core import Reason


class YieldTime:
    """Adds up spans from a refusal to the next quantum (or the work's end), by ``reason``."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._since_s = 0.0
        self._seconds: dict[Reason, float] = {}

    def hold(self, reason: Reason, now_s: float) -> None:
        """The policy said no; a span with another reason ends here."""
        if reason != self.reason:
            self.end(now_s)
            self.reason, self._since_s = reason, now_s

    def end(self, now_s: float) -> None:
        """Training runs, or has nothing to do."""
        if self.reason is not None:
            self._add(now_s)
            self.reason = None

    def _add(self, now_s: float) -> None:
        assert self.reason is not None
        self._seconds[self.reason] = self._seconds.get(self.reason, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def totals(self, now_s: float) -> dict[Reason, float]:
        """Seconds by reason until now; they never fall."""
        if self.reason is not None:
            self._add(now_s)
        return dict(self._seconds)

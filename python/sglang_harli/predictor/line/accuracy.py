"""How good predictions were: error and coverage of the upper bound, of all steps and the latest.  A
step is judged before it enters the fit.  Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

RECENT = 200  # steps


@dataclass(frozen=True, slots=True)
class Score:
    """Of one phase.

    Attributes:
        steps: that were judged.
        mape: mean absolute percentage error, as a share of the measured time (0.1 is 10%).
        coverage: share of steps that took no longer than their upper bound.
        recent_mape, recent_coverage: of the latest ``RECENT`` steps.
    """

    steps: int
    mape: float
    coverage: float
    recent_mape: float
    recent_coverage: float


class Accuracy:
    """Counts the predictions of one phase."""

    def __init__(self) -> None:
        self.steps = self._covered = self._recent_covered = 0
        self._error = self._recent_error = 0.0
        self._recent: deque[tuple[float, bool]] = deque()

    def count(self, expected_s: float, upper_s: float, seconds: float) -> None:
        """``expected_s``, at most ``upper_s``, were predicted of a step of ``seconds`` (> 0)."""
        error = abs(expected_s - seconds) / seconds
        covered = seconds <= upper_s
        self.steps += 1
        self._error += error
        self._covered += covered
        self._recent_error += error
        self._recent_covered += covered
        self._recent.append((error, covered))
        if len(self._recent) > RECENT:
            old_error, old_covered = self._recent.popleft()
            self._recent_error -= old_error
            self._recent_covered -= old_covered

    def score(self) -> Score | None:
        """None before the first step."""
        recent = len(self._recent)
        if not recent:
            return None
        return Score(
            steps=self.steps,
            mape=self._error / self.steps,
            coverage=self._covered / self.steps,
            recent_mape=max(self._recent_error, 0.0) / recent,
            recent_coverage=self._recent_covered / recent,
        )

"""How far a quantum's estimate is doubted, because it alone holds training back.  Pure floats."""

from __future__ import annotations


class Doubt:
    """One kind's doubt, from its first refusal since it last ran; each further one lowers ``level``
    (a factor on the least quantum's price, from 1 down) by the time between them."""

    def __init__(self) -> None:
        self.level = 1.0
        self._at_s: float | None = None  # of the latest refusal

    def refused(self, now_s: float, half_life_s: float) -> None:
        """The estimate alone held training back again.  One call halves the level at most: time in
        which nothing was held back (no request, no slack) says nothing about the estimate."""
        if self._at_s is not None:
            self.level *= 0.5 ** min(max(now_s - self._at_s, 0.0) / half_life_s, 1.0)
        self._at_s = now_s

    def ran(self) -> None:
        """The kind has run."""
        self.level, self._at_s = 1.0, None

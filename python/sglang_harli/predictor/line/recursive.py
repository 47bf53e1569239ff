"""Recursive least squares for one cost line: ``seconds = t0 + t1 * x1 + t2 * x2``.  Pure floats.

Step times scatter in proportion to their length, so residuals are relative, and every term is a
factor over its prior.  Beyond the textbook's recursion:

*Directional forgetting* (Cao and Schwartz, Automatica 36, 2000): an observation lets only that part
of the past fade that it says something about itself.  So nothing winds up while the load stands
still, collinear data do no harm, and hours at batch 1 do not unlearn what batch 32 takes.

*Abrupt changes* (another process takes a core): a run of residuals with the same sign, larger than
the scatter before it, moves the height of the whole line at once, and re-opens the covariance.

*Outliers* count with at most three times the usual scatter (Huber), and no term falls below 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_harli.predictor.line.symmetric import Sym3, inverse, plus, plus_outer, projected, scaled

NOISE = 0.1  # relative scatter of one observation that the information matrix counts in; only its ratio to priors matters
CLAMP = 3.0  # an observation counts as at most this many times the scatter from the expectation
WARM_UP = 8  # observations after which outliers are distinguished from a bad first guess
FARTHEST = 3.0  # relative residual above which nothing counts, even of the first observations
SCATTER_FLOOR = 0.005
SCATTER_STEP = 0.05
# A change: so many residuals of one sign in a row, with a median above so many deviations.
RUNS = ((8, 2.5), (16, 1.0))
LEAST_CHANGE = 0.02  # relative; smaller ones are left to forgetting
REOPENED_HEIGHT, REOPENED_SHAPE = 0.3, 0.15  # relative uncertainty added by a change
GOOD_PART = 0.5
LEAST_FACTOR = 0.05  # a term that has fallen to 0 may come back
TINY_S = 1e-9


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a line before it is observed.

    Attributes:
        terms: seconds, seconds per unit of x1, of x2; a term of 0 stays 0.
        height: relative standard deviation that all terms share: how fast the machine is.
        shape: relative standard deviation of each term by itself.
    """

    terms: tuple[float, float, float]
    height: float = 1.0
    shape: float = 0.7


class RecursiveLine:
    """A line that follows what is measured.

    Args:
        prior: the line before anything is observed; keeps its shape where observations say nothing.
        forgetting: weight of the past per observation in the observation's direction.

    Attributes:
        seen: observations that entered; changes: abrupt changes that were found.
        scatter: mean absolute relative residual, recent.
    """

    def __init__(self, prior: Prior, *, forgetting: float = 0.99) -> None:
        self.prior, self.forgetting = prior, forgetting
        self._t0, self._t1, self._t2 = prior.terms
        self._f0 = self._f1 = self._f2 = 1.0
        s = prior.shape * prior.shape
        self._set(plus_outer((s, 0.0, 0.0, s, 0.0, s), (1.0, 1.0, 1.0), prior.height * prior.height))
        self.seen = self.changes = 0
        self.scatter = prior.height / 4
        self._run: list[float] = []  # ratios of measured over expected with one sign, in a row
        self._scatter_before = self.scatter

    @property
    def terms(self) -> tuple[float, float, float]:
        """Seconds, and seconds per unit of x1 and x2, as they are now."""
        return self._t0 * self._f0, self._t1 * self._f1, self._t2 * self._f2

    def expected(self, x1: float, x2: float) -> float:
        """Seconds."""
        seconds = self._t0 * self._f0 + self._t1 * self._f1 * x1 + self._t2 * self._f2 * x2
        return seconds if seconds > TINY_S else TINY_S

    def doubt(self, x1: float, x2: float) -> float:
        """Relative standard deviation of the expectation: large where nothing like it was seen."""
        z0, z1, z2 = self._t0, self._t1 * x1, self._t2 * x2
        p00, p01, p02, p11, p12, p22 = self._covariance
        expected = z0 * self._f0 + z1 * self._f1 + z2 * self._f2
        if expected <= TINY_S:
            return self.prior.height
        variance = (
            z0 * (p00 * z0 + 2 * (p01 * z1 + p02 * z2)) + z1 * (p11 * z1 + 2 * p12 * z2) + p22 * z2 * z2
        )
        return math.sqrt(max(variance, 0.0)) / expected

    def along(self, x1: float, x2: float) -> tuple[float, float, float, float, float]:
        """Of loads ``k * (x1, x2)``: expectation ``a + b*k``, variance ``c + d*k + e*k*k``.  So
        many sizes of one quantum are priced for little more than one."""
        z0, u1, u2 = self._t0, self._t1 * x1, self._t2 * x2
        p00, p01, p02, p11, p12, p22 = self._covariance
        return (
            z0 * self._f0,
            u1 * self._f1 + u2 * self._f2,
            p00 * z0 * z0,
            2 * z0 * (p01 * u1 + p02 * u2),
            u1 * (p11 * u1 + 2 * p12 * u2) + p22 * u2 * u2,
        )

    def observe(self, x1: float, x2: float, seconds: float) -> tuple[int, float] | None:
        """``seconds`` (above 0, else ignored) were measured at this load; returns (n, factor) where
        a change multiplied the line by ``factor`` before the latest n observations."""
        if not 0.0 < seconds < math.inf:
            return None
        ratio = seconds / self.expected(x1, x2)
        change = None
        if not self.seen:  # how fast the machine is; the shape stays the prior's
            self._scale(ratio)
            self._set(self._spread(x1, x2, self.prior.height, self.prior.shape))
            ratio = 1.0
        elif self.seen >= WARM_UP and (change := self._change(ratio)) is not None:
            self.changes += 1
            self._scale(change[1])
            added = self._spread(x1, x2, REOPENED_HEIGHT, REOPENED_SHAPE)
            self._set(plus(self._covariance, added))
            self.scatter = self._scatter_before
            ratio /= change[1]
        residual = ratio - 1.0
        self._update(x1, x2, residual, self._weight(abs(residual)))
        self.seen += 1
        return change

    # ---------------------------------------------------------------- outliers and changes
    def _weight(self, size: float) -> float:
        """Of an observation with a residual of that size: 1, or less for an outlier (Huber)."""
        limit = CLAMP * self.scatter if self.seen >= WARM_UP else FARTHEST
        bounded = min(size, limit + SCATTER_FLOOR)
        self.scatter = max(self.scatter + SCATTER_STEP * (bounded - self.scatter), SCATTER_FLOOR)
        return bounded / size if size > bounded else 1.0

    def _change(self, ratio: float) -> tuple[int, float] | None:
        """(length of the run, factor) if this observation shows that the speed has changed."""
        run = self._run
        if run and (run[-1] > 1.0) != (ratio > 1.0):
            run.clear()
        if not run:
            self._scatter_before = self.scatter
        run.append(ratio)
        for length, deviations in RUNS:
            if len(run) != length:
                continue
            median = sorted(run)[length // 2]
            if abs(median - 1.0) > max(deviations * 1.25 * self._scatter_before, LEAST_CHANGE):
                run.clear()
                return length, median
        if len(run) >= RUNS[-1][0]:
            del run[: RUNS[-1][0] // 2]  # looked at again before long
        return None

    def _scale(self, factor: float) -> None:
        """The whole line, with its relative uncertainty."""
        self._f0, self._f1, self._f2 = self._f0 * factor, self._f1 * factor, self._f2 * factor
        square = factor * factor
        self._covariance = scaled(self._covariance, square)
        self._information = scaled(self._information, 1.0 / square)

    def _set(self, covariance: Sym3) -> None:
        self._covariance, self._information = covariance, inverse(covariance)

    def _spread(self, x1: float, x2: float, height: float, shape: float) -> Sym3:
        """Covariance of the factors at this load: ``height`` together, ``shape`` each.  Any term
        may be a good part of it: a first guess may have given one all, another none."""
        part = GOOD_PART * self.expected(x1, x2)
        f = [self._f0, self._f1, self._f2]
        s = [
            shape * max(factor, part / (term * x) if term * x > 0.0 else 0.0, LEAST_FACTOR)
            for factor, term, x in zip(f, self.prior.terms, (1.0, x1, x2), strict=True)
        ]
        independent = (s[0] * s[0], 0.0, 0.0, s[1] * s[1], 0.0, s[2] * s[2])
        return plus_outer(independent, (f[0], f[1], f[2]), height * height)

    # ---------------------------------------------------------------- the recursion
    def _update(self, x1: float, x2: float, residual: float, weight: float) -> None:
        scale = 1.0 / (NOISE * self.expected(x1, x2))
        u = (self._t0 * scale, self._t1 * x1 * scale, self._t2 * x2 * scale)
        r = self._information
        q0 = r[0] * u[0] + r[1] * u[1] + r[2] * u[2]
        q1 = r[1] * u[0] + r[3] * u[1] + r[4] * u[2]
        q2 = r[2] * u[0] + r[4] * u[1] + r[5] * u[2]
        known = u[0] * q0 + u[1] * q1 + u[2] * q2
        if known > 1.0:  # where next to nothing is known, nothing fades
            r = plus_outer(r, (q0, q1, q2), -weight * (1.0 - self.forgetting) / known)
        r = plus_outer(r, u, weight)
        p = inverse(r)
        gain = weight * residual / NOISE
        f = (
            self._f0 + gain * (p[0] * u[0] + p[1] * u[1] + p[2] * u[2]),
            self._f1 + gain * (p[1] * u[0] + p[3] * u[1] + p[4] * u[2]),
            self._f2 + gain * (p[2] * u[0] + p[4] * u[1] + p[5] * u[2]),
        )
        if not all(map(math.isfinite, (*f, *p))):  # numbers beyond all measure: begin again from here
            p = self._spread(x1, x2, self.prior.height, self.prior.shape)
            r, f = inverse(p), (self._f0, self._f1, self._f2)
        if f[0] < 0.0 or f[1] < 0.0 or f[2] < 0.0:
            f = projected(f, p)
        self._information, self._covariance = r, p
        self._f0, self._f1, self._f2 = f

"""Lines through measured points: robust least squares with terms from 0 up (numpy).  For a profile
table, before serving begins; later measurements go through ``recursive``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from sglang_harli.predictor.line.recursive import Prior

HUBER = 1.345  # standard deviations; 95% efficient where residuals are normal
ROUNDS = 50
TOLERANCE = 1e-9
# A term that the points do not show gets this share of the time at their mean, so it can grow.
LEAST_SHARE = 0.02
MEASURED_HEIGHT, MEASURED_SHAPE = 0.3, 0.1  # uncertainty of a line that was measured here, on another day


def line(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Terms of ``seconds = features @ terms``: relative residuals, Huber's loss, no term below 0.

    Args:
        features: ``[points, terms]``; a column of ones is the base.
        seconds: ``[points]``, above 0.

    ValueError: no points, not finite, or times that are not above 0.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"a line needs points: features {x.shape}, seconds {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (y > 0).all()):
        raise ValueError("a line needs finite features and times above 0")
    weights = np.ones_like(y)
    scale = y.copy()  # residuals are relative to the expectation; at first to what was measured
    terms = _not_negative(x / scale[:, None], y / scale, weights)
    for _ in range(ROUNDS):
        expected = np.maximum(x @ terms, 1e-3 * y)
        residuals = y / expected - 1.0
        spread = max(1.4826 * float(np.median(np.abs(residuals))), 1e-6)
        weights = np.minimum(1.0, HUBER * spread / np.maximum(np.abs(residuals), 1e-12))
        last, terms = terms, _not_negative(x / expected[:, None], y / expected, weights)
        if np.allclose(last, terms, rtol=TOLERANCE, atol=0.0):
            break
    return terms


def _not_negative(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares; with so few terms every set of those above 0 can be tried."""
    root = np.sqrt(weights)
    norms = np.linalg.norm(x, axis=0)
    norms[norms == 0.0] = 1.0
    a, b = x / norms * root[:, None], y * root
    count = x.shape[1]
    best, least = np.zeros(count), float(b @ b)
    for size in range(1, count + 1):
        for kept in combinations(range(count), size):
            columns = list(kept)
            found = np.linalg.lstsq(a[:, columns], b, rcond=1e-10)[0]
            if (found < 0).any():
                continue
            loss = float(np.sum((a[:, columns] @ found - b) ** 2))
            if loss < least * (1 - 1e-9):
                least, best = loss, np.zeros(count)
                best[columns] = found
    return best / norms


def measured_prior(x1: Sequence[float], x2: Sequence[float], seconds: Sequence[float], first: Prior) -> Prior:
    """The prior of a line with points (``x1``, ``x2``) of its own; ValueError as ``line``.
    ``first``, the guess without points, gives the shape where they do not show a term."""
    features = np.column_stack([np.ones(len(seconds)), x1, x2])
    terms = line(features, np.asarray(seconds, dtype=np.float64))
    mean = features.mean(axis=0)
    at_mean = float(terms @ mean)
    shown = np.ptp(features, axis=0) > 1e-3 * np.maximum(np.abs(mean), 1e-12)
    shown[0] = shown[1:].any()
    if not shown.any():  # one load only: its height, and the guess's shape
        guess = np.asarray(first.terms)
        terms = guess * at_mean / max(float(guess @ mean), 1e-12)
    least = np.where(mean > 0, LEAST_SHARE * at_mean / np.where(mean > 0, mean, 1.0), np.asarray(first.terms))
    least = np.where(np.asarray(first.terms) > 0, least, 0.0)  # a feature that this line does not have
    base, slope, square = (float(value) for value in np.maximum(terms, least))
    return Prior((base, slope, square), MEASURED_HEIGHT, MEASURED_SHAPE)

"""Symmetric 3 x 3 matrices as six plain floats: numpy's calls cost more than the arithmetic."""

from __future__ import annotations

Sym3 = tuple[float, float, float, float, float, float]  # 00 01 02 11 12 22
Vec3 = tuple[float, float, float]


def inverse(m: Sym3) -> Sym3:
    """Of a positive definite matrix; of one that is not, numbers that are not finite."""
    a, b, c, d, e, f = m
    m00, m01, m02 = d * f - e * e, c * e - b * f, b * e - c * d
    determinant = a * m00 + b * m01 + c * m02
    if not determinant > 0.0:
        nan = float("nan")
        return nan, nan, nan, nan, nan, nan
    k = 1.0 / determinant
    return m00 * k, m01 * k, m02 * k, (a * f - c * c) * k, (b * c - a * e) * k, (a * d - b * b) * k


def scaled(m: Sym3, k: float) -> Sym3:
    """``k * m``."""
    return m[0] * k, m[1] * k, m[2] * k, m[3] * k, m[4] * k, m[5] * k


def plus(a: Sym3, b: Sym3) -> Sym3:
    """``a + b``."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]


def plus_outer(m: Sym3, v: Vec3, weight: float) -> Sym3:
    """``m + weight * v v'``."""
    a, b, c = v
    wa, wb = weight * a, weight * b
    return (
        m[0] + wa * a,
        m[1] + wa * b,
        m[2] + wa * c,
        m[3] + wb * b,
        m[4] + wb * c,
        m[5] + weight * c * c,
    )


def projected(f: Vec3, covariance: Sym3) -> Vec3:
    """The nearest point with no negative component, in the metric of the inverse covariance: one
    after the other is put to 0 and moves the others as they are correlated; then cut at 0."""
    p00, p01, p02, p11, p12, p22 = covariance
    columns = ((p00, p01, p02), (p01, p11, p12), (p02, p12, p22))
    values = list(f)
    fixed: set[int] = set()
    for _ in range(2):
        lowest = min(range(3), key=values.__getitem__)
        if values[lowest] >= 0.0:
            break
        column = columns[lowest]
        move = values[lowest] / column[lowest] if column[lowest] > 0.0 else 0.0
        fixed.add(lowest)
        values = [0.0 if i in fixed else value - move * column[i] for i, value in enumerate(values)]
    return max(values[0], 0.0), max(values[1], 0.0), max(values[2], 0.0)

"""What distinguishes base models: config fields that change the result, and a sample of weights."""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct

_FIELDS_SHOWN = 3
# Explicit bits of a mantissa, and the exponent of the smallest normal value.
_FORMATS = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}


class BasePrint(Struct, frozen=True, kw_only=True):
    """The print of a served base; the same however its weights are named, placed, fused or padded.

    Attributes:
        model, path: the served name, and absolute folder or hub id: shown, never compared.
        dtype: of the served weights.
        math: config fields that change what the model computes.
        weights: by parameter without its layer's number, some values of it, over the layers.
        digest: of more values, exact: compared where both prints are of one dtype.
    """

    model: str
    path: str
    dtype: str
    math: dict[str, Any]
    weights: dict[str, tuple[float, ...]]
    digest: str

    @property
    def shown(self) -> str:
        """The base in an error or a reason."""
        return self.model if self.model == self.path else f"{self.model} ({self.path})"


def difference(one: BasePrint, other: BasePrint) -> str:
    """What differs between two bases, as a clause, or ``""``.  Different dtypes are compared within
    the coarser one's rounding: bfloat16, float16 or float32 of one checkpoint are the same base."""
    if one is other:
        return ""
    mine, theirs = one.math, other.math
    fields = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if fields:
        more = f" and {len(fields) - _FIELDS_SHOWN} more" if len(fields) > _FIELDS_SHOWN else ""
        shown = (f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in fields[:_FIELDS_SHOWN])
        return f"their configs differ: {', '.join(shown)}{more}"
    unlike = sorted(one.weights.keys() ^ other.weights.keys())
    if unlike:
        return f"their parameters differ: one of them has no {', '.join(unlike[:_FIELDS_SHOWN])}"
    if one.dtype == other.dtype:
        return "" if one.digest == other.digest else "their weights differ"
    for name, values in one.weights.items():
        pairs = zip(values, other.weights[name], strict=False)
        if not all(_same(a, one.dtype, b, other.dtype) for a, b in pairs):
            return f"their weights differ, those of {name} for one"
    return ""


def _same(a: float, a_dtype: str, b: float, b_dtype: str) -> bool:
    """Whether one value may have been rounded to both."""
    size = max(abs(a), abs(b))
    return abs(a - b) <= max(_step(size, a_dtype), _step(size, b_dtype))


def _step(size: float, dtype: str) -> float:
    """The distance of neighbouring values of a dtype at this size."""
    bits, smallest = _FORMATS[dtype]
    exponent = max(math.frexp(size)[1] - 1, smallest) if size else smallest
    return math.ldexp(1.0, exponent - bits)

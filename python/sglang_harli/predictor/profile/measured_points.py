"""The measured loads, a few of each, for a profile table.  Bounded, plain Python."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable

from sglang_harli.core import QuantumKind
from sglang_harli.predictor.profile.profile_table import (
    DecodePoint,
    PrefillPoint,
    ProfileKey,
    ProfileTable,
    QuantumPoint,
    half_octave,
)

KEPT_LOADS = 128  # of each list; the one that was not seen for longest goes first
KEPT_TIMES = 9  # of each load, the latest: a point is their median
LEAST_TIMES = 3  # fewer say little


class _Loads:
    """Times by load; loads of one key count as the same."""

    def __init__(self) -> None:
        self._of: dict[Hashable, deque[tuple[int, int, float]]] = {}

    def add(self, key: Hashable, a: int, b: int, seconds: float) -> None:
        if not 0.0 < seconds < float("inf"):
            return
        times = self._of.pop(key, None)
        if times is None:
            times = deque(maxlen=KEPT_TIMES)
            if len(self._of) >= KEPT_LOADS:
                del self._of[next(iter(self._of))]
        times.append((a, b, seconds))
        self._of[key] = times  # at the end: seen last

    def medians(self) -> list[tuple[Hashable, int, int, float]]:
        """(key, mean of a, mean of b, median seconds)."""
        found = []
        for key, times in self._of.items():
            if len(times) >= LEAST_TIMES:
                a, b, seconds = zip(*times, strict=True)
                found.append(
                    (key, round(sum(a) / len(a)), round(sum(b) / len(b)), statistics.median(seconds))
                )
        return found


class MeasuredPoints:
    """Collects what a predictor observes."""

    def __init__(self) -> None:
        self._decode, self._prefill, self._quanta = _Loads(), _Loads(), _Loads()

    def decode(self, batch: int, context_tokens: int, seconds: float, share: int) -> None:
        self._decode.add((batch, half_octave(context_tokens), share), batch, context_tokens, seconds)

    def prefill(self, tokens: int, pairs: int, seconds: float) -> None:
        self._prefill.add((half_octave(tokens), half_octave(pairs)), tokens, pairs, seconds)

    def quantum(self, kind: QuantumKind, tokens: int, row_tokens: int, seconds: float) -> None:
        self._quanta.add((kind, tokens, row_tokens), tokens, row_tokens, seconds)

    def table(self, key: ProfileKey) -> ProfileTable:
        """The medians of every load that was measured often enough."""
        return ProfileTable(
            key,
            decode=tuple(
                DecodePoint(batch, context, seconds, load[2])  # type: ignore[index]
                for load, batch, context, seconds in self._decode.medians()
            ),
            prefill=tuple(PrefillPoint(tokens, pairs, s) for _, tokens, pairs, s in self._prefill.medians()),
            quanta=tuple(
                QuantumPoint(load[0], tokens, row_tokens, seconds)  # type: ignore[index]
                for load, tokens, row_tokens, seconds in self._quanta.medians()
            ),
        )

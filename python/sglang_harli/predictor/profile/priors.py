"""What is believed before serving: first guesses, or lines through a profile table's points."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang_harli.core import QuantumKind
from sglang_harli.predictor.line.fit import measured_prior
from sglang_harli.predictor.line.recursive import Prior
from sglang_harli.predictor.profile.profile_table import ProfileTable
from sglang_harli.predictor.quanta import ATTENDING
from sglang_harli.predictor.solo import WHOLE, Padding

# A quantum per token, in units of one layer's forward for one token.
_SHARE = {
    QuantumKind.EMBED: 0.1,
    QuantumKind.FORWARD: 1.0,
    QuantumKind.BACKWARD: 3.5,
    QuantumKind.BACKWARD_KEPT: 2.5,
    QuantumKind.HEAD: 4.0,
    QuantumKind.HEAD_EVAL: 2.0,
    QuantumKind.CHECK: 2.0,
}


@dataclass(frozen=True, slots=True)
class Priors:
    """Lines of every phase.

    Attributes:
        decode: by SM share; corun: ``rho`` by SM share and kind of quantum, where measured.
        measured: phases of serving (``decode`` on the whole device, ``prefill``) from a profile.
    """

    decode: Mapping[int, Prior]
    prefill: Prior
    quanta: Mapping[QuantumKind, Prior]
    corun: Mapping[tuple[int, QuantumKind], float] = field(default_factory=dict)
    measured: frozenset[str] = frozenset()


def first_guess(
    *,
    token_s: float = 1e-4,
    pair_s: float = 1e-7,
    layers: int = 32,
    base_s: float = 2e-3,
    decode_s: float = 0.015,
    decode_shares: tuple[float, float] = (0.1, 1e-4),
) -> Priors:
    """Without any measurement.

    Args:
        token_s, pair_s: one layer's forward for one token, and attention of one to another.
        base_s, decode_s: what any quantum takes, and a decode step of one request.
        decode_shares: what a request more, and a token of context more, add to it.
    """
    quanta = {}
    for kind in QuantumKind:
        share = _SHARE.get(kind, 0.0)
        pair = pair_s * share if kind in ATTENDING else 0.0
        quanta[kind] = Prior((base_s, token_s * share, pair))
    prefill = Prior((decode_s, token_s * layers, pair_s * layers))
    request, context = decode_shares
    decode = Prior((decode_s, request * decode_s, context * decode_s))
    return Priors({WHOLE: decode}, prefill, quanta)


def from_table(table: ProfileTable, guess: Priors, padding: Padding | None = None) -> Priors:
    """Lines through measured points; ``guess`` stands where there are none.  ``padding`` is the
    predictor's, so that both count the same batch sizes."""
    pad = Padding() if padding is None else padding
    decode, whole = {}, guess.decode.get(WHOLE, next(iter(guess.decode.values())))
    for share in sorted({point.share for point in table.decode}):
        points = [point for point in table.decode if point.share == share]
        decode[share] = measured_prior(
            [pad(p.batch) for p in points],
            [p.context_tokens for p in points],
            [p.seconds for p in points],
            whole,
        )
    prefill = guess.prefill
    if table.prefill:
        points = table.prefill
        seconds = [p.seconds for p in points]
        prefill = measured_prior([p.tokens for p in points], [p.pairs for p in points], seconds, prefill)
    quanta = dict(guess.quanta)
    for kind in {point.kind for point in table.quanta}:
        points = [point for point in table.quanta if point.kind == kind]
        pairs = [p.tokens * p.row_tokens if kind in ATTENDING else 0 for p in points]
        seconds = [p.seconds for p in points]
        quanta[kind] = measured_prior([p.tokens for p in points], pairs, seconds, guess.quanta[kind])
    measured = {"decode"} if WHOLE in decode else set()
    return Priors(
        {**guess.decode, **decode},
        prefill,
        quanta,
        {**guess.corun, **_slowdowns(table, decode, pad)},
        frozenset(measured | ({"prefill"} if table.prefill else set())),
    )


def _slowdowns(
    table: ProfileTable, decode: Mapping[int, Prior], pad: Padding
) -> dict[tuple[int, QuantumKind], float]:
    """The median slowdown per SM of training; a share without solo points has none."""
    found: dict[tuple[int, QuantumKind], list[float]] = {}
    for point in table.corun:
        solo = decode.get(point.share)
        if solo is not None:
            base, per_request, per_token = solo.terms
            alone = base + per_request * pad(point.batch) + per_token * point.context_tokens
            rho = (point.seconds / alone - 1.0) / point.finetune_sms
            found.setdefault((point.share, point.kind), []).append(rho)
    return {key: max(statistics.median(values), 0.0) for key, values in found.items()}

"""What quanta are offered for, and what the predictor learns from those that ran."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_harli.core import Claim, LatencyEstimate, QuantumKind, QuantumOffer
from sglang_harli.managers.scheduler.training.quantum_timer import Measured, Work
from sglang_harli.peft_trainer.run import QuantumShape, TrainingRun
from sglang_harli.predictor.latency_predictor import LatencyPredictor

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 1024)  # rows of a quantum to choose from


def offer_of(
    predictor: LatencyPredictor, training: TrainingRun, shape: QuantumShape, claim: Claim
) -> QuantumOffer:
    """The next quantum of a run, in the sizes that it can be cut to."""
    sizes = [*(r for r in SIZES if r < shape.rows and not shape.fixed), shape.rows]
    firsts = training.new_shapes(shape, sizes)
    candidates = predictor.prices(shape.kind, sizes, shape.row_tokens, shape.attended, firsts)
    return QuantumOffer(shape.kind, candidates, shape.fixed, predictor.doubt(shape.kind), claim)


def single(predictor: LatencyPredictor, kind: QuantumKind, claim: Claim = Claim.POLICY) -> QuantumOffer:
    """A quantum of a kind that is not cut."""
    upper_s, doubt = predictor.quantum(kind, 1).upper_s, predictor.doubt(kind)
    return QuantumOffer(kind, ((1, upper_s),), True, doubt, claim)


def left_when_launched(predictor: LatencyPredictor, work: Work, price_s: float) -> LatencyEstimate:
    """What a device has yet to compute of a quantum that is launched.  Its price may be that of the
    launch, which is over."""
    if work.first_of_shape or not work.tokens:
        return LatencyEstimate(price_s, price_s)
    return predictor.device(work.kind, work.tokens, work.row_tokens)


def learn(predictor: LatencyPredictor, measured: Iterable[Measured]) -> None:
    """From quanta that are over."""
    for each in measured:
        work = each.work
        if not work.tokens:
            predictor.ran(work.kind)
            continue
        predictor.observe_quantum(
            work.kind,
            work.tokens,
            work.row_tokens,
            each.seconds,
            first_of_shape=work.first_of_shape,
            launch_s=each.launch_s,
            starved=each.starved,
        )

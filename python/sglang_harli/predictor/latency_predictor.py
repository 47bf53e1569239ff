"""What serving's steps and training's quanta will take (docs/internals/predictor.md).

    solo    T1 = c + beta * batch + kappa * context tokens, per SM share; prefill in tokens and
            pairs of them
    co-run  T2 = T1 * (1 + rho * SMs of training), per kind of quantum; in turns: a sum, and a
            factor on the step that comes after training
    quanta  a line per kind

Every estimate is an expectation and an upper bound that 99 of 100 steps are to keep.  Lines start
from a profile table or a cautious guess, follow what is measured, and score themselves.  One
thread's, plain floats, no disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.predictor.corun import CoRun
from sglang_harli.predictor.line.accuracy import Accuracy, Score
from sglang_harli.predictor.line.cost_line import CostLine
from sglang_harli.predictor.profile.measured_points import MeasuredPoints
from sglang_harli.predictor.profile.priors import Priors, first_guess
from sglang_harli.predictor.quanta import QuantumLines
from sglang_harli.predictor.solo import WHOLE, Padding, SoloDecode, SoloPrefill, times

KNOWN_FROM = 48  # batches
DECODE, ADAPTED, PREFILL = "decode", "decode_adapters", "prefill"
ADAPTER_GUESS = 1.6  # a decode step with adapters over one without, before any was seen


class LatencyPredictor:
    """The predictor of one scheduler.

    ``priors``: default: a cautious guess.  ``padding``: of decode batches to CUDA graphs.
    ``points``: the measured loads, for a profile.
    """

    def __init__(self, priors: Priors | None = None, *, padding: Padding | None = None) -> None:
        priors = first_guess() if priors is None else priors
        self._decode = SoloDecode(priors.decode, padding)
        self._adapted: SoloDecode | None = None  # batches with a LoRA adapter; once there was one
        self._prefill = SoloPrefill(priors.prefill)
        self._quanta = QuantumLines(priors.quanta)
        self._corun = CoRun(priors.corun)
        self._profiled = priors.measured
        self.points = MeasuredPoints()

    # ---------------------------------------------------------------- estimates
    def decode(
        self,
        batch: int,
        context_tokens: int,
        share: int = WHOLE,
        *,
        adapters: bool = False,
        after_training: bool = False,
    ) -> LatencyEstimate:
        """A decode step of ``batch`` requests with ``context_tokens`` in all, on ``share`` SMs.
        ``adapters``: one uses a LoRA adapter; ``after_training``: quanta run right before it."""
        solo = self._adapted if adapters and self._adapted is not None else self._decode
        found = solo.estimate(batch, context_tokens, share, after_training=after_training)
        return times(found, ADAPTER_GUESS) if adapters and self._adapted is None else found

    def prefill(self, tokens: int, pairs: int | None = None) -> LatencyEstimate:
        """A prefill of ``tokens`` new tokens; ``pairs``: of a new token and one it attends to."""
        return self._prefill.estimate(tokens, pairs)

    def corun(
        self, batch: int, context_tokens: int, share: int, finetune_sms: int, kind: QuantumKind
    ) -> LatencyEstimate:
        """A decode step on ``share`` SMs beside quanta of ``kind`` on ``finetune_sms``."""
        solo = self._decode.estimate(batch, context_tokens, share)
        return self._corun.estimate(solo, share, finetune_sms, kind)

    def quantum(self, kind: QuantumKind, tokens: int, row_tokens: int = 0) -> LatencyEstimate:
        """A quantum of ``tokens`` tokens in rows of ``row_tokens``: of the device or of its launch,
        whichever is longer."""
        return self._quanta.estimate(kind, tokens, row_tokens)

    def device(self, kind: QuantumKind, tokens: int, row_tokens: int = 0) -> LatencyEstimate:
        """As ``quantum``, of the device alone: what is left once it is launched."""
        return self._quanta.device(kind, tokens, row_tokens)

    def prices(
        self,
        kind: QuantumKind,
        sizes: Iterable[int],
        row_tokens: int,
        attended: int = 0,
        firsts: Iterable[bool] = (),
    ) -> tuple[tuple[int, float], ...]:
        """``(rows, upper bound in seconds)``, both rising, as a QuantumOffer's candidates.

        The largest size is always among them.  A size that costs more than a larger one (it has not
        run yet) is left out: it would hide that the larger one fits.

        Args:
            attended: tokens that each attends to, if not ``row_tokens`` (a row cut into blocks).
            firsts: of each size, whether it is its shape's first run, whose bound is wider.
        """
        return self._quanta.prices(kind, sizes, row_tokens, attended, firsts)

    def doubt(self, kind: QuantumKind) -> float:
        """Factor on the price of the least quantum of ``kind``, from 1 down (``relax``)."""
        return self._quanta.doubt(kind)

    # ---------------------------------------------------------------- measurements
    def observe_decode(
        self,
        batch: int,
        context_tokens: int,
        seconds: float,
        share: int = WHOLE,
        *,
        adapters: bool = False,
        after_training: bool = False,
    ) -> None:
        """A decode step alone took ``seconds``; ``after_training``: quanta ran right before it."""
        if adapters:
            if self._adapted is None:
                self._adapted = self._decode.slower(ADAPTER_GUESS)
            self._adapted.observe(batch, context_tokens, seconds, share, after_training=after_training)
            return
        alone_s = self._decode.observe(batch, context_tokens, seconds, share, after_training=after_training)
        self.points.decode(batch, context_tokens, alone_s, share)

    def observe_prefill(self, tokens: int, seconds: float, pairs: int | None = None) -> None:
        """A prefill of ``tokens`` new tokens took ``seconds``; ``pairs`` as in ``prefill``."""
        pairs = tokens * tokens if pairs is None else pairs
        self._prefill.observe(tokens, seconds, pairs)
        self.points.prefill(tokens, pairs, seconds)

    def observe_corun(
        self,
        batch: int,
        context_tokens: int,
        share: int,
        finetune_sms: int,
        kind: QuantumKind,
        seconds: float,
    ) -> None:
        solo = self._decode.estimate(batch, context_tokens, share)
        self._corun.observe(solo, share, finetune_sms, kind, seconds)

    def observe_quantum(
        self,
        kind: QuantumKind,
        tokens: int,
        row_tokens: int,
        seconds: float,
        *,
        first_of_shape: bool = False,
        launch_s: float = 0.0,
        starved: bool = False,
    ) -> None:
        """A quantum took ``seconds``; a shape's first run has a bound apart, once any is known.

        Args:
            launch_s: of the host, before the device had all of it; 0: they are one (CPU).
            starved: the device waited for the host: alone it takes between ``seconds - launch_s``
                and ``seconds``.
        """
        self._quanta.ran(kind)
        if launch_s:
            self._quanta.observe_launch(kind, tokens, row_tokens, launch_s, first_of_shape=first_of_shape)
        if starved:
            alone_s = self._quanta.alone(kind, tokens, row_tokens, seconds, launch_s)
            if alone_s is None:
                return
            seconds = alone_s
        self._quanta.observe(kind, tokens, row_tokens, seconds, first_of_shape=first_of_shape)
        if not first_of_shape:
            self.points.quantum(kind, tokens, row_tokens, seconds)

    def ran(self, kind: QuantumKind) -> None:
        """A quantum of ``kind`` has run whose time says nothing: it is not doubted any more."""
        self._quanta.ran(kind)

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        """The estimate of ``kind`` alone holds training back: doubt it, until the next run."""
        self._quanta.relax(kind, now_s)

    # ---------------------------------------------------------------- how good it is
    @property
    def profiled(self) -> bool:
        """Whether it started from a profile of decode steps."""
        return DECODE in self._profiled

    def known(self, phase: str) -> bool:
        """Whether ``decode`` or ``prefill`` rests on enough measurements, or on a profile's."""
        line = self._decode.line(WHOLE)[0] if phase == DECODE else self._prefill.line
        return phase in self._profiled or line.seen >= KNOWN_FROM

    def scores(self) -> dict[str, tuple[Score, float]]:
        """By predicted phase: its score, and the ratio of upper bound to expectation now.

        Phases: ``decode``, ``decode_adapters``, ``prefill``, each kind of quantum, ``launch_`` with
        a kind (on CUDA), ``first_`` with a kind (a shape's first run) and ``corun_`` with a kind.
        """
        whole, _ = self._decode.line(WHOLE)
        phases: list[tuple[str, Accuracy, float]] = [
            (DECODE, self._decode.accuracy, whole.ratio),
            (PREFILL, self._prefill.line.accuracy, self._prefill.line.ratio),
        ]
        if self._adapted is not None:
            phases.append((ADAPTED, self._adapted.accuracy, self._adapted.line(WHOLE)[0].ratio))
        phases += [(kind.value, line.accuracy, line.ratio) for kind, line in self._quanta.lines.items()]
        phases += [
            (f"launch_{kind}", line.accuracy, line.ratio) for kind, line in self._quanta.launches.items()
        ]
        phases += [
            (f"first_{kind}", first.accuracy, first.ratio) for kind, first in self._quanta.firsts.items()
        ]
        phases += [
            (f"corun_{kind}", accuracy, self._corun.ratio(kind))
            for kind, accuracy in self._corun.accuracy.items()
        ]
        found = ((name, accuracy.score(), ratio) for name, accuracy, ratio in phases)
        return {name: (score, ratio) for name, score, ratio in found if score is not None}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Error, coverage and margin by phase, as ``harli status`` shows them."""
        return {
            name: {
                "steps": score.steps,
                "mape": round(score.recent_mape, 4),
                "coverage": round(score.recent_coverage, 4),
                "total_mape": round(score.mape, 6),
                "total_coverage": round(score.coverage, 6),
                "upper_ratio": round(ratio, 3),
            }
            for name, (score, ratio) in self.scores().items()
        }

    def costs(self) -> dict[str, dict[str, float]]:
        """Per kind of quantum that has run: line, ratio of the bound, runs, changes of speed."""
        return {kind.value: _line(line) for kind, line in self._quanta.lines.items() if line.seen}


def _line(line: CostLine) -> dict[str, float]:
    base, slope, square = line.line.terms
    return {
        "base_ms": round(base * 1e3, 4),
        "token_ms": round(slope * 1e3, 6),
        "pair_ms": round(square * 1e3, 9),
        "upper_ratio": round(line.ratio, 3),
        "seen": line.seen,
        "changes": line.line.changes,
    }

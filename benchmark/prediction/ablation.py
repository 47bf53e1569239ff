"""Replays recorded steps through predictors that each lack one mechanism: error, coverage and width
of the bound.

Part of ``ablate_predictor.py``.  Every step is predicted before it is learnt, so all are held out.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sglang_harli.core import QuantumKind
from sglang_harli.predictor import quanta, solo
from sglang_harli.predictor.after_training import AfterTraining
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.line import margin
from sglang_harli.predictor.line.recursive import RecursiveLine

WARM_UP = 300  # decode steps that are learnt and not judged: a predictor starts from a guess
# Off, and still neutral: the error of no phase grows by more than this, its coverage falls by no
# more, and no bound is wider by more (shares; of coverage a difference).
MORE_ERROR, LESS_COVERAGE, WIDER = 0.02, 0.002, 0.02
PLAIN_RATIO = 1.3  # upper bound over expectation where no margin is learnt

Call = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Judged:
    """One phase of one recording.

    Attributes:
        steps: that were judged.
        mape: mean absolute error as a share of the measured time.
        coverage: share of steps that took no longer than their upper bound.
        width: mean ratio of upper bound to expectation.
    """

    steps: int
    mape: float
    coverage: float
    width: float


# ------------------------------------------------------------------ what is switched off
def _line_with(**values: float) -> Callable[..., None]:
    made = RecursiveLine.__init__

    def init(self: RecursiveLine, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **{**named, **values})

    return init


def _all_ones(_self: RecursiveLine, _size: float) -> float:
    return 1.0


def _along(self: RecursiveLine, x1: float, x2: float) -> tuple[float, float, float, float, float]:
    base, slope, square = self.terms
    return base, slope * x1 + square * x2, 0.0, 0.0, 0.0


def _nothing(*_arguments: Any, **_named: Any) -> None:
    return None


def _plain_margin(self: margin.Margin) -> None:
    self.ratio = PLAIN_RATIO


def _to_the_line(
    self: quanta.QuantumLines,
    kind: QuantumKind,
    tokens: int,
    row_tokens: int,
    seconds: float,
    *,
    first_of_shape: bool,
) -> None:
    del first_of_shape
    pairs = tokens * row_tokens if kind in quanta.ATTENDING else 0
    self._measured.add(kind)
    self.lines[kind].observe(tokens, pairs, seconds)


# Of each mechanism: what it is replaced by.
OFF: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "nothing": (),
    "level-follow": ((solo, "FOLLOWS", 0.0),),
    "run detection": ((RecursiveLine, "_change", _nothing),),
    "forgetting": ((RecursiveLine, "__init__", _line_with(forgetting=1.0)),),
    "limit of outliers": ((RecursiveLine, "_weight", _all_ones),),
    "conformal margin": ((margin.Margin, "_set", _plain_margin),),
    "steering of the margin": ((margin, "STEERING", 0.0),),
    "doubt of the line": ((RecursiveLine, "doubt", lambda *_: 0.0), (RecursiveLine, "along", _along)),
    "relax": ((LatencyPredictor, "relax", _nothing),),
    "steps after training": ((AfterTraining, "observe", _nothing),),
    "first runs apart": ((quanta.QuantumLines, "observe", _to_the_line),),
}


@contextlib.contextmanager
def without(mechanism: str) -> Iterator[None]:
    """The predictor lacks it for the length of a block."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in OFF[mechanism]:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


# ------------------------------------------------------------------ the replay
class _Phase:
    def __init__(self) -> None:
        self.errors: list[float] = []
        self.covered: list[bool] = []
        self.widths: list[float] = []

    def count(self, expected_s: float, upper_s: float, seconds: float) -> None:
        self.errors.append(abs(expected_s - seconds) / seconds)
        self.covered.append(seconds <= upper_s)
        self.widths.append(upper_s / expected_s)

    def judged(self) -> Judged:
        mean = statistics.fmean
        return Judged(len(self.errors), mean(self.errors), mean(self.covered), mean(self.widths))


def replay(calls: Sequence[Call], mechanism: str) -> dict[str, Any]:
    """The recorded calls through a predictor without the mechanism.

    Returns:
        by phase that was judged (``decode``, ``prefill``, ``quantum``) a ``Judged``; ``doubted``:
        quanta that ran while their price was doubted, ``too_high``: those of them that took less
        than the price said.
    """
    with without(mechanism):
        return _replay(calls, LatencyPredictor())


def _replay(calls: Sequence[Call], predictor: LatencyPredictor) -> dict[str, Any]:
    phases: dict[str, _Phase] = {}
    decoded = doubted = too_high = 0

    def judge(phase: str, expected_s: float, upper_s: float, seconds: float) -> None:
        if decoded > WARM_UP:
            phases.setdefault(phase, _Phase()).count(expected_s, upper_s, seconds)

    for name, *values in calls:
        if name == "decode":
            batch, context, us, adapters, after = values
            flags = {"adapters": bool(adapters), "after_training": bool(after)}
            found = predictor.decode(batch, context, **flags)
            decoded += 1
            judge("decode", found.expected_s, found.upper_s, us / 1e6)
            predictor.observe_decode(batch, context, us / 1e6, **flags)
        elif name == "prefill":
            tokens, pairs, us = values
            found = predictor.prefill(tokens, pairs)
            judge("prefill", found.expected_s, found.upper_s, us / 1e6)
            predictor.observe_prefill(tokens, us / 1e6, pairs)
        elif name == "quantum":
            kind, tokens, row_tokens, us, first = QuantumKind(values[0]), *values[1:]
            found = predictor.quantum(kind, tokens, row_tokens)
            if predictor.doubt(kind) < 1.0:
                doubted += 1
                too_high += us / 1e6 < found.expected_s
            if not first:
                judge("quantum", found.expected_s, found.upper_s, us / 1e6)
            predictor.observe_quantum(kind, tokens, row_tokens, us / 1e6, first_of_shape=bool(first))
        elif name == "relax":
            predictor.relax(QuantumKind(values[0]), values[1] / 1e3)
        elif name == "ran":
            predictor.ran(QuantumKind(values[0]))
        else:
            raise ValueError(f"a recording holds no call {name!r}")
    return {
        **{name: phase.judged() for name, phase in phases.items()},
        "doubted": doubted,
        "too_high": too_high,
    }


def ablate(calls: Sequence[Call]) -> dict[str, dict[str, Any]]:
    """By mechanism that is off, ``nothing`` first: as ``replay``."""
    return {mechanism: replay(calls, mechanism) for mechanism in OFF}


# ------------------------------------------------------------------ what earns its keep
def harms(whole: dict[str, Any], off: dict[str, Any]) -> list[str]:
    """What is worse without a mechanism than with all of them, a few words each."""
    found = []
    for phase, with_all in whole.items():
        if not isinstance(with_all, Judged):
            continue
        other: Judged = off[phase]
        if other.mape > (1 + MORE_ERROR) * with_all.mape:
            found.append(f"{phase}: error {_percent(with_all.mape)} to {_percent(other.mape)}")
        if other.coverage < with_all.coverage - LESS_COVERAGE:
            found.append(f"{phase}: covered {_percent(with_all.coverage)} to {_percent(other.coverage)}")
        if other.width > (1 + WIDER) * with_all.width:
            found.append(f"{phase}: bound {with_all.width:.2f} to {other.width:.2f}")
    if off["too_high"] < whole["too_high"]:
        found.append(f"{whole['too_high']} prices that were too high found out, to {off['too_high']}")
    return found


def neutral(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The mechanisms without which nothing is worse in any recording.

    Args:
        found: by recording, as ``ablate``.
    """
    return [
        mechanism
        for mechanism in OFF
        if mechanism != "nothing"
        and not any(harms(recording["nothing"], recording[mechanism]) for recording in found.values())
    ]


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Rows of Markdown: recording and mechanism; error, coverage and bound of each phase."""
    lines = [
        "| recording | off | decode: error, covered, bound | prefill | quanta | worse than with all |",
        "|---|---|---|---|---|---|",
    ]
    for recording, by_mechanism in found.items():
        for mechanism, values in by_mechanism.items():
            cells = " | ".join(_cell(values.get(phase)) for phase in ("decode", "prefill", "quantum"))
            worse = "; ".join(harms(by_mechanism["nothing"], values)) or "-"
            lines.append(f"| {recording} | {mechanism} | {cells} | {worse} |")
    return "\n".join(lines)


def _cell(judged: Judged | None) -> str:
    if judged is None:
        return "none"
    return f"{_percent(judged.mape)}, {_percent(judged.coverage)}, {judged.width:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"

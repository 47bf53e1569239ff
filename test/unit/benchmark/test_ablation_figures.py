"""The ablation of the predictor switches off what it says, and finds what that costs."""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.core import QuantumKind
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import ablate_predictor
from prediction import ablation
from prediction.ablation import Judged
from prediction.recorder import read, write

FORWARD = QuantumKind.FORWARD.value


def _calls(steps: int = 1200) -> list[list[Any]]:
    """Decode steps and quanta of a machine that is half as fast from the middle on, with
    scatter."""
    rng = random.Random(7)
    calls: list[list[Any]] = []
    for n in range(steps):
        speed = 2.0 if n > steps // 2 else 1.0
        batch = rng.choice((1, 2, 4, 8))
        us = speed * (7000 + 900 * batch + 0.4 * 300 * batch) * rng.lognormvariate(0, 0.03)
        calls.append(["decode", batch, 300 * batch, round(us), 0, n % 2])
        if n % 3 == 0:
            quantum_us = speed * (500 + 20 * 32) * rng.lognormvariate(0, 0.03)
            calls.append(["quantum", FORWARD, 32, 32, round(quantum_us), 0])
        if n % 50 == 0:
            calls += [["prefill", 100, 5000, round(2e4 * speed)], ["relax", FORWARD, 40 * n], ["ran", "copy"]]
    return calls


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return ablation.ablate(_calls())


def test_every_mechanism_is_switched_off_and_on_again():
    before = {
        name: [getattr(owner, attribute) for owner, attribute, _ in changes]
        for name, changes in ablation.OFF.items()
    }
    for name, changes in ablation.OFF.items():
        with ablation.without(name):
            for owner, attribute, value in changes:
                assert getattr(owner, attribute) is value
    assert before == {
        name: [getattr(owner, attribute) for owner, attribute, _ in changes]
        for name, changes in ablation.OFF.items()
    }


def test_each_phase_is_judged_behind_the_warm_up(found: dict[str, dict[str, Any]]):
    whole = found["nothing"]
    assert whole["decode"].steps == 1200 - ablation.WARM_UP
    assert whole["quantum"].steps == 300
    assert whole["prefill"].steps == 18
    assert whole["decode"].mape < 0.06
    assert whole["decode"].coverage > 0.97


def test_with_nothing_off_the_figures_are_the_predictors_own():
    predictor, errors = LatencyPredictor(), []
    calls = [call for call in _calls() if call[0] == "decode"]
    for _, batch, context, us, _, after in calls:
        expected_s = predictor.decode(batch, context, after_training=bool(after)).expected_s
        errors.append(abs(expected_s - us / 1e6) / (us / 1e6))
        predictor.observe_decode(batch, context, us / 1e6, after_training=bool(after))
    whole = ablation.replay(calls, "nothing")
    assert whole["decode"].mape == pytest.approx(statistics.fmean(errors[ablation.WARM_UP :]))
    assert ablation.harms(whole, whole) == []


@pytest.mark.parametrize("mechanism", ["forgetting", "run detection", "conformal margin"])
def test_what_a_change_of_speed_needs_is_missed(mechanism: str, found: dict[str, dict[str, Any]]):
    assert ablation.harms(found["nothing"], found[mechanism])


def test_what_no_step_needs_is_neutral(found: dict[str, dict[str, Any]]):
    idle = ablation.neutral({"made": found})
    assert "first runs apart" in idle  # there is none
    assert "conformal margin" not in idle
    assert "nothing" not in idle


def test_a_price_that_relaxing_finds_too_high_counts():
    guess_too_high = [["relax", FORWARD, 0], ["relax", FORWARD, 400_000], ["quantum", FORWARD, 32, 32, 9, 0]]
    calls = [*_calls(400), *guess_too_high]
    assert ablation.replay(calls, "nothing")["too_high"] == 1 + ablation.replay(calls, "relax")["too_high"]


def test_a_call_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="no call 'corun'"):
        ablation.replay([["corun", 1]], "nothing")


def test_worse_is_worse_by_more_than_the_limit():
    whole = {"decode": Judged(1000, 0.05, 0.99, 1.2), "doubted": 0, "too_high": 0}
    same = {**whole, "decode": Judged(1000, 0.0509, 0.9885, 1.22)}
    assert ablation.harms(whole, same) == []
    for worse in (Judged(1000, 0.052, 0.99, 1.2), Judged(1000, 0.05, 0.987, 1.2), Judged(9, 0.05, 0.99, 1.3)):
        assert len(ablation.harms(whole, {**whole, "decode": worse})) == 1


def test_recordings_that_are_missing_or_short_fail(found: dict[str, dict[str, Any]]):
    wrong = ablate_predictor.wanting({"quiet": found})
    assert any(line.startswith("quiet: 900 steps of decode") for line in wrong)
    assert any(line.startswith("bursts: 0 steps of quantum") for line in wrong)


def test_the_table_names_every_mechanism(found: dict[str, dict[str, Any]]):
    shown = ablation.table({"made": found})
    assert all(f"| made | {mechanism} |" in shown for mechanism in ablation.OFF)


def test_a_recording_is_read_as_it_was_written(tmp_path: Path):
    calls = _calls(20)
    path = tmp_path / "made.jsonl.gz"
    write(path, calls)
    first = path.read_bytes()
    write(path, calls)
    assert (read(path), path.read_bytes()) == (calls, first)

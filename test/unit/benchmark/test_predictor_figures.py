"""The predictor's benchmark fails when what must hold does not."""

from __future__ import annotations

import copy
import sys

import pytest

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import bench_predictor
from prediction import server as real

COST = {"decision, batch of 32": {"p50_us": 20.0, "p99_us": 49.0, "max_us": 500.0}}
LOADS = {
    "cpu": {
        "mape": 0.05,
        "coverage": 0.99,
        "mape_after": 0.05,
        "coverage_after": 0.985,
        "back_after": 30.0,
        "upper_ratio": 1.1,
    }
}


def test_what_holds_passes():
    assert bench_predictor.judge(COST, LOADS) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mape", 0.1),
        ("mape_after", 0.2),
        ("coverage", 0.9799),
        ("coverage_after", 0.9),
        ("coverage", float("nan")),
        ("mape", float("nan")),
        ("back_after", 201.0),
    ],
)
def test_what_does_not_hold_is_named(name, value):
    loads = copy.deepcopy(LOADS)
    loads["cpu"][name] = value
    (wrong,) = bench_predictor.judge(COST, loads)
    assert wrong.startswith("cpu: ")


def test_a_slow_decision_and_missing_measurements_fail():
    slow = {"decision, batch of 32": {"p50_us": 20.0, "p99_us": 50.0, "max_us": 60.0}}
    assert "p99 50.0 us" in bench_predictor.judge(slow, LOADS)[0]
    assert bench_predictor.judge({}, LOADS) == ["no decision was timed"]
    assert bench_predictor.judge(COST, {}) == ["no load was predicted"]


def test_when_coverage_is_back():
    assert bench_predictor.back_after([True] * 400) == 0
    assert bench_predictor.back_after([False] * 30 + [True] * 400) == 26  # four of the next 200 may be missed
    assert bench_predictor.back_after([False] * 400) == 400


def test_a_load_is_predicted_step_by_step():
    rig = bench_predictor.MACHINES["cpu, 25M"]
    row = bench_predictor.one_load(rig, lambda rng: rng.gauss(1, 0.02), 1.6, 1500, seed=1)
    assert row["mape"] < 0.05 and row["coverage"] > 0.95 and row["upper_ratio"] < 1.2


# ---------------------------------------------------------------- on a real server
SERVER = {
    "quiet": {"steps": 2000, "mape": 0.05, "coverage": 0.985},
    "core taken": {"steps": 1800, "mape": 0.3, "coverage": 0.985, "back_after": 200},
    "core given back": {"steps": 1800, "mape": 0.06, "coverage": 0.99, "back_after": 0},
    "job": {"busy_quanta": 9},
}


def test_a_server_that_holds_passes():
    assert real.judge(SERVER) == []
    assert "| core taken | 1800 | 30.00% | 98.50% | 200 steps |" in real.table(SERVER)


@pytest.mark.parametrize(
    ("span", "name", "value"),
    [
        ("quiet", "mape", 0.1),
        ("quiet", "mape", float("nan")),
        ("quiet", "coverage", 0.979),
        ("quiet", "steps", 399),
        ("core taken", "coverage", 0.97),
        ("core taken", "back_after", 201),
        ("core given back", "coverage", float("nan")),
        ("job", "busy_quanta", 0),
    ],
)
def test_what_does_not_hold_on_a_server_is_named(span, name, value):
    found = copy.deepcopy(SERVER)
    found[span][name] = value
    (wrong,) = real.judge(found)
    assert wrong.startswith("server")


def test_spans_of_looks():
    looks = [real.Seen(float(n), 50 * n, 50 * n - min(50 * n, 100), 5.0 * n) for n in range(20)]
    assert real.span(looks[0], looks[19]) == real.Span(950, pytest.approx(0.1), pytest.approx(850 / 950))
    assert real.back_after(looks) == 100  # the first hundred were missed
    assert real.from_step(looks, 120).steps == 150 and real.from_step(looks, 9999) is looks[-1]
    never = [real.Seen(float(n), 50 * n, 0, 0.0) for n in range(8)]
    assert real.back_after(never) == 350

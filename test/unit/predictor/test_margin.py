"""The upper bound covers what it promises, whatever the distribution."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.predictor.line.accuracy import RECENT, Accuracy
from sglang_harli.predictor.line.margin import CAP, FLOOR, PRIOR_RATIO, WINDOW, Margin

SCATTER = {
    "normal": lambda rng: max(rng.gauss(1, 0.05), 0.5),
    "skewed": lambda rng: rng.lognormvariate(0, 0.2),
    "two humps": lambda rng: 1.5 if rng.random() < 0.2 else rng.uniform(0.9, 1.0),
    "rare accidents": lambda rng: rng.gauss(1, 0.02) * (rng.uniform(1.5, 3) if rng.random() < 0.03 else 1),
}


def coverage(margin: Margin, scores: list[float]) -> float:
    covered = 0
    for score in scores:
        covered += score <= margin.ratio
        margin.observe(score)
    return covered / len(scores)


@pytest.mark.parametrize("name", SCATTER)
def test_ninety_eight_of_a_hundred_steps_are_covered(name):
    rng = random.Random(7)
    assert coverage(Margin(), [SCATTER[name](rng) for _ in range(5000)]) >= 0.98


def test_the_bound_is_no_wider_than_it_must_be():
    margin, rng = Margin(), random.Random(1)
    coverage(margin, [rng.gauss(1, 0.05) for _ in range(2000)])
    assert 1.08 < margin.ratio < 1.22  # the 99% point of this scatter is 1.116


def test_before_anything_is_seen_the_prior_holds_and_then_fades():
    margin = Margin()
    assert margin.ratio == PRIOR_RATIO
    ratios = []
    for _ in range(150):
        margin.observe(1.0)
        ratios.append(margin.ratio)
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] == FLOOR


@given(scores=st.lists(st.floats(0.0, 1e6), max_size=400))
def test_the_ratio_stays_within_its_limits_and_the_window_is_bounded(scores):
    margin = Margin()
    for score in scores:
        margin.observe(score)
    assert FLOOR <= margin.ratio <= max(CAP, PRIOR_RATIO)
    assert margin.seen == min(len(scores), WINDOW)


def test_a_correction_of_the_expectation_takes_the_latest_scores_with_it():
    margin = Margin()
    for _ in range(200):
        margin.observe(1.0)
    for _ in range(8):
        margin.observe(2.0)
    assert margin.ratio == 2.0
    margin.rescale(8, 2.0)
    assert margin.ratio == FLOOR


def test_a_drift_of_the_scatter_is_followed():
    margin, rng = Margin(), random.Random(3)
    scores = [rng.gauss(1, 0.02 + 0.08 * n / 4000) for n in range(4000)]
    assert coverage(margin, scores) >= 0.98


def test_accuracy_of_all_and_of_the_latest():
    accuracy = Accuracy()
    assert accuracy.score() is None
    for _ in range(RECENT):
        accuracy.count(1.0, 1.1, 2.0)  # half of it, and above the bound
    for _ in range(RECENT):
        accuracy.count(1.0, 1.1, 1.0)
    score = accuracy.score()
    assert score is not None
    assert (score.steps, score.mape, score.coverage) == (2 * RECENT, 0.25, 0.5)
    assert (score.recent_mape, score.recent_coverage) == (0.0, 1.0)

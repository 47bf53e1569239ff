"""The recursion: it learns a line, follows changes, and keeps what observations say nothing
about."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.predictor.line.recursive import Prior, RecursiveLine

PRIOR = Prior((0.015, 0.0015, 1.5e-6))
TRUTH = (0.007, 0.0009, 4e-7)


def seconds(x1: float, x2: float, terms: tuple[float, ...] = TRUTH) -> float:
    return terms[0] + terms[1] * x1 + terms[2] * x2


def load(rng: random.Random) -> tuple[int, int]:
    batch = rng.choice((1, 2, 4, 8, 16))
    return batch, batch * rng.randint(50, 1500)


def taught(count: int = 1000, *, noise: float = 0.03, seed: int = 0) -> RecursiveLine:
    line, rng = RecursiveLine(PRIOR), random.Random(seed)
    for _ in range(count):
        x = load(rng)
        line.observe(*x, seconds(*x) * rng.lognormvariate(0, noise))
    return line


@given(
    base=st.floats(1e-3, 1e-1),
    slope=st.floats(0, 1e-2),
    square=st.floats(0, 1e-5),
    noise=st.sampled_from((0.0, 0.02, 0.1)),
    seed=st.integers(0, 1000),
)
def test_it_learns_a_line(base, slope, square, noise, seed):
    line, rng = RecursiveLine(PRIOR), random.Random(seed)
    terms = (base, slope, square)
    for _ in range(400):
        x = load(rng)
        line.observe(*x, seconds(*x, terms) * rng.lognormvariate(0, noise))
    for x in ((1, 100), (4, 3000), (16, 20000)):
        assert line.expected(*x) == pytest.approx(seconds(*x, terms), rel=0.05 + noise)


@given(
    times=st.lists(
        st.one_of(st.floats(1e-7, 1e3), st.sampled_from((0.0, -1.0, math.nan, math.inf))), max_size=60
    ),
    loads=st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 10**7)), min_size=1, max_size=5),
)
def test_whatever_is_measured_it_stays_finite_and_positive(times, loads):
    line = RecursiveLine(PRIOR)
    for n, value in enumerate(times):
        line.observe(*loads[n % len(loads)], value)
    assert all(math.isfinite(term) and term >= 0 for term in line.terms)
    for x in loads:
        assert 0 < line.expected(*x) < math.inf
        assert 0 <= line.doubt(*x) < math.inf


def test_one_load_moves_the_height_and_keeps_the_priors_shape():
    line = RecursiveLine(PRIOR)
    for _ in range(2000):
        line.observe(4, 1000, 0.044)
    factor = 0.044 / seconds(4, 1000, PRIOR.terms)
    for x in ((1, 100), (16, 8000)):
        assert line.expected(*x) == pytest.approx(factor * seconds(*x, PRIOR.terms), rel=0.01)


def test_hours_of_one_load_do_not_unlearn_another():
    line, rng = taught(), random.Random(1)
    for _ in range(20_000):
        context = rng.randint(100, 110)
        line.observe(1, context, seconds(1, context) * rng.lognormvariate(0, 0.03))
    assert line.expected(16, 12_000) == pytest.approx(seconds(16, 12_000), rel=0.05)


def test_collinear_loads_leave_nothing_wound_up():
    line, rng = taught(), random.Random(2)
    before = line.doubt(16, 100)
    for _ in range(5000):
        batch = rng.choice((1, 2, 4, 8, 16))
        line.observe(batch, 700 * batch, seconds(batch, 700 * batch) * rng.lognormvariate(0, 0.03))
    assert line.doubt(16, 100) < before * 1.5 + 0.01
    assert line.expected(16, 100) == pytest.approx(seconds(16, 100), rel=0.1)


def test_outliers_count_little():
    line, rng = RecursiveLine(PRIOR), random.Random(3)
    for _ in range(2000):
        x = load(rng)
        accident = 50.0 if rng.random() < 0.02 else 1.0
        line.observe(*x, seconds(*x) * rng.lognormvariate(0, 0.03) * accident)
    assert line.changes == 0
    assert line.expected(4, 3000) == pytest.approx(seconds(4, 3000), rel=0.05)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2.0, 5.0])
def test_a_change_of_speed_moves_the_whole_line_within_a_few_steps(factor):
    line = taught()
    for _ in range(12):  # one load only: the others move with it
        line.observe(1, 300, factor * seconds(1, 300))
    assert line.changes == 1
    for x in ((1, 300), (16, 12_000)):
        assert line.expected(*x) == pytest.approx(factor * seconds(*x), rel=0.1)


@given(seed=st.integers(0, 300))
def test_scatter_alone_is_no_change_of_speed(seed):
    line, rng = RecursiveLine(PRIOR), random.Random(seed)
    for _ in range(600):
        x = load(rng)
        line.observe(*x, seconds(*x) * rng.lognormvariate(0, 0.1))
    assert line.changes <= 1  # 16 of one sign in a row happen by chance once in some ten thousand steps


def test_what_was_never_seen_is_doubted_more():
    line = RecursiveLine(PRIOR)
    assert line.doubt(1, 100) > 0.5
    for _ in range(50):
        line.observe(1, 100, 0.008)
    assert line.doubt(1, 100) < 0.05 < line.doubt(32, 30_000)

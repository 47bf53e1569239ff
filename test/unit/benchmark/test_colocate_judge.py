"""The judge of the co-location benchmark: a fixture that breaks each row, and the statistics behind
it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate import judge as colocate_judge
from colocate import report
from colocate.judge import (
    BURST,
    FAILS,
    FEW,
    HARLI,
    HOLDS,
    IDLE,
    MISSING,
    NICE,
    OPEN,
    PLAIN_LOOP,
    SERVE,
    SHIFT,
    UNCOORDINATED,
    Interval,
    Row,
    interval,
    judge,
    shares,
)
from support.colocate_cells import REQUESTS, TARGETS, Change, cell, late, of, results, slow


def test_everything_holds_where_it_does():
    assert [(row.text, row.found) for row in judge(results()) if row.verdict != HOLDS] == []


# ------------------------------------------------------------------ a fixture for each row
FAULTS: list[tuple[Change, str]] = [
    *(
        (of(HARLI, load, label, tpots_ms=late(6)), f"within target, {load}% busy, {label}")
        for load in (40, 80)
        for label in TARGETS
    ),
    (of(HARLI, 40, "4x", tokens_per_s=0.89 * 1200), "efficiency, 40% busy, 4x"),
    (of(HARLI, 40, "2x", tokens_per_s=0.79 * 1200), "efficiency, 40% busy, 2x"),
    (of(HARLI, 40, "1.5x", tokens_per_s=0.74 * 1200), "efficiency, 40% busy, 1.5x"),
    (of(SERVE, 40, busy=0.2), "efficiency, 40% busy, 2x"),
    (of(HARLI, 40, "2x", train_only_tokens_per_s=2500.0), "efficiency, 40% busy, 2x"),
    (of(HARLI, IDLE, tokens_per_s=0.96 * 2000), "idle with default limits"),
    (of(PLAIN_LOOP, IDLE, "4 rows", tokens_per_s=1800.0), "plain loop in one batch"),
    (of(PLAIN_LOOP, IDLE, "2 rows", tokens_per_s=2050.0), "plain loop at its best (2 rows)"),
    (of(NICE, 40, tokens_per_s=1200.0), "of nice 19, 1 thread"),
    (of(UNCOORDINATED, 40, tpots_ms=[10.0] * REQUESTS), "of two processes, 2 threads"),
    (of(HARLI, 40, "2x", pss_bytes=4 * 2**30), "memory of all processes"),
    (of(HARLI, BURST, ttfts_ms=slow(3, 400.0)), "the latest first token"),
    (of(HARLI, BURST, tpots_ms=lambda c: [22.0, *c["tpots_ms"][1:]]), "the latest last token"),
    (of(HARLI, BURST, tpots_ms=late(1)), "the latest last token"),
    (of(HARLI, 40, prediction={"mape": 0.2, "coverage": 0.99}), "mean error of predicted"),
    (of(HARLI, 40, prediction={"mape": 0.01, "coverage": 0.95}), "within their upper bound"),
    (
        of(HARLI, SHIFT, shift={"after": {"coverage": 0.97}, "steps": 400}),
        "after another process took half a core",
    ),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_each_row_fails_where_it_does_not_hold(change, words):
    found = results()
    change(found)
    assert [row.text for row in judge(found) if row.verdict == FAILS and words in row.text]


def test_every_row_has_a_fixture_that_breaks_it():
    for row in judge(results()):
        assert any(words in row.text for _, words in FAULTS), row.text


def test_a_row_fails_only_when_the_whole_interval_is_on_the_wrong_side():
    assert Row("", Interval(0.9, 0.8, 0.989, 3), 0.99).verdict == FAILS
    assert Row("", Interval(0.9, 0.8, 0.99, 3), 0.99).verdict == OPEN
    assert Row("", Interval(1.0, 0.99, 1.1, 3), 0.99).verdict == HOLDS
    assert Row("", Interval(1.1, 1.01, 1.2, 3), 1.0, at_least=False).verdict == FAILS
    assert Row("", Interval(1.1, 1.0, 1.2, 3), 1.0, at_least=False).verdict == OPEN
    assert Row("", Interval(0.9, 0.8, 1.0, 3), 1.0, at_least=False).verdict == HOLDS
    assert Row("", None, 1.0).verdict == MISSING


def test_one_repetition_has_no_interval_and_fails_no_ratio():
    found = results()
    of(HARLI, IDLE, tokens_per_s=100.0)(found)
    found["cells"] = [c for c in found["cells"] if c["repetition"] == 1]
    (row,) = [row for row in judge(found) if row.text.startswith("idle")]
    assert row.verdict == OPEN and row.found is not None and row.found.value < 0.1


def test_disturbed_cells_enter_nothing():
    found = results()
    for c in found["cells"]:
        if c["mode"] == HARLI and c["load"] == IDLE and c["repetition"] == 2:
            c.update(tokens_per_s=1.0, disturbed="other processes used 40%")
    (row,) = [row for row in judge(found) if row.text.startswith("idle")]
    assert row.verdict == HOLDS and row.found is not None and row.found.n == 2


def test_separate_processes_are_compared_on_the_requests_that_they_had():
    found = results()
    setting = "2x" + colocate_judge.APART + FEW
    few = [cell(HARLI, 40, setting, repetition=n, tokens_per_s=200.0) for n in (1, 2, 3)]
    found["cells"] += few
    (row,) = [row for row in judge(found) if "of nice 19, 1 thread" in row.text]
    assert row.verdict == FAILS and row.found.value == pytest.approx(200 / 300, rel=0.01)
    assert "harli, with the same requests: 200 tokens/s" in report.page(found, [])
    assert colocate_judge.label_of(setting) == "2x"


def test_a_setting_that_does_not_keep_the_share_is_not_compared():
    texts = [row.text for row in judge(results())]
    assert not [text for text in texts if "of two processes, 2 threads" in text]
    assert [text for text in texts if "of nice 19, 1 thread" in text]


def test_baselines_are_judged_against_serve_only_with_the_same_requests():
    found = results()
    for n in (1, 2, 3):
        few = cell(SERVE, 40, FEW, repetition=n, tokens=[7] * 10, tpots_ms=[10.0] * 10, busy=0.4)
        found["cells"].insert(0, few)
    change = of(NICE, 40, "1 thread", tokens=[7] * 10, tpots_ms=[10.0] * 10)
    change(found)
    share = colocate_judge.kept(found["cells"], NICE, "1 thread", 40, 20.0)
    assert share is not None and share.n == 30 and share.value == 1.0
    assert colocate_judge.efficiencies(found["cells"], 40, "2x") == pytest.approx(
        colocate_judge.efficiencies(results()["cells"], 40, "2x")
    )


def test_a_baseline_that_trains_nothing_is_beaten():
    found = results()
    of(NICE, 40, tokens_per_s=0.0)(found)
    (row,) = [row for row in judge(found) if "of nice 19" in row.text]
    assert row.verdict == HOLDS


# ------------------------------------------------------------------ statistics
def test_the_interval_is_students_t_on_logarithms():
    found = interval([1.0, 1.1, 1.21])
    assert found is not None and found.value == pytest.approx(1.1)
    half = 4.303 * math.log(1.1) / math.sqrt(3)
    assert found.lower == pytest.approx(1.1 * math.exp(-half)) and found.n == 3
    assert interval([]) is None
    single = interval([2.0])
    assert single == Interval(2.0, 0.0, math.inf, 1)
    assert interval([0.0, 1.0]) == interval([0.0, 1.0], logs=False)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=12))
def test_an_interval_holds_its_value(values):
    for logs in (True, False):
        found = interval(values, logs=logs)
        assert found is not None
        assert found.lower <= found.value * (1 + 1e-9) and found.value <= found.upper * (1 + 1e-9)


def test_shares_are_of_the_same_requests():
    all_on, half = [1] * 40, [1, 0] * 20
    assert shares([(all_on, all_on)]) == Interval(1.0, 1.0, 1.0, 40)
    same = shares([(half, half), (half, half)])  # in pairs: what is late in both is no difference
    assert same == Interval(1.0, 1.0, 1.0, 80)
    found = shares([(half, all_on)])
    assert found is not None and found.value == 0.5 and 0.3 < found.lower < 0.5 < found.upper < 0.7
    assert shares([(half, [0] * 40)]) is None and shares([]) is None


def test_requests_of_one_repetition_are_no_independent_witnesses():
    """All of a slow minute's requests are late together: one such minute of four proves nothing."""
    on, late = [1] * 100, [1] * 60 + [0] * 40
    one = shares([(late, on), (on, on), (on, on), (on, on)])
    assert one is not None and one.value == 0.9 and one.lower < 0.85 and one.upper == 1.0
    each = shares([(late, on)] * 4)
    assert each is not None and each.upper < 0.7


def test_first_tokens_of_one_prefill_are_compared_as_one():
    alone = cell(SERVE, BURST, ttfts_ms=[60.0] + [350.0] * 15)
    ours = cell(
        HARLI, BURST, ttfts_ms=[320.0 + 0.1 * n for n in range(16)], limits_ms={"idle": 250.0, "busy": 40.0}
    )
    assert colocate_judge.burst_excess(ours, alone, 20.0)[0] == pytest.approx(321.5 / 600.0, rel=0.01)
    ours["ttfts_ms"][0] = 311.0 - 2 * colocate_judge.TOGETHER_MS
    assert colocate_judge.burst_excess(ours, alone, 20.0)[0] == pytest.approx(291.0 / 310.0, rel=0.01)

"""The arithmetic of the benchmark of a pair, and its verdict."""

from __future__ import annotations

import itertools
import sys

import pytest

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

from common.load import Seen
from common.replay import Sent
from disaggregated import judge, page
from disaggregated.pairs import split
from disaggregated.plan import HARLI, SERVE, Scale, mean_output, piece
from disaggregated.run import seen
from sglang_harli.simulation.traces import Trace, TraceRequest

TRACE = Trace("trace", tuple(TraceRequest(float(n * n), 800, 400 + n) for n in range(20)))


def cell(mode: str, repetition: int = 1, late: int = 0, **more):
    tpots = [30.0] * late + [10.0] * (100 - late)
    found = {"mode": mode, "load": judge.LOAD, "setting": judge.SETTING, "repetition": repetition}
    own = {"busy": 0.5} if mode == SERVE else {"tokens_per_s": 400.0, "train_only_tokens_per_s": 1000.0}
    rest = {"disturbed": None, "failures": [], "pss_bytes": 2**30, "seconds": 60.0}
    return found | {"tpots_ms": tpots, "ttfts_ms": [50.0] * 100} | own | rest | more


def results(*cells):
    calibration = {"rate": 1.5, "tpot_ms": 10.0, "measured": [(1.0, 0.4)]}
    given = {"target_ms": 20.0, "multiple": 2.0, "load": 50, "calibration": calibration}
    return given | {"noise_rule": "none", "cells": list(cells)}


def test_a_piece_keeps_the_proportions_of_the_gaps_at_the_rate_asked_for():
    rows = piece(TRACE, 1, 5, rate=2.0, scale=Scale(prompts=8, outputs=4, most=1024))
    assert rows[0].arrival_s == 0 and rows[-1].arrival_s == pytest.approx(2.0)
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(rows)]
    assert gaps[1] / gaps[0] == pytest.approx(13 / 11)
    assert (rows[0].prompt_tokens, rows[0].output_tokens) == (100, 101)
    assert mean_output(rows) == pytest.approx(101.8, abs=0.3)
    with pytest.raises(ValueError, match="20 requests, 25"):
        piece(TRACE, 4, 5, rate=2.0, scale=Scale())


def test_what_is_too_long_is_cut():
    short = Scale(prompts=1, outputs=1, most=256).apply(TraceRequest(0.0, 9000, 4000), 1.0)
    assert (short.prompt_tokens, short.output_tokens, short.arrival_s) == (128, 128, 1.0)


def test_a_request_that_failed_and_one_that_did_not_end_are_failures():
    found = seen(Sent([Seen(0.1, 0.01, 5, 1.0), None, None], 1.0, 3.0, ["OSError: gone"]))
    assert found["tpots_ms"] == [10.0, None, None] and found["ttfts_ms"][0] == 100.0
    assert found["failures"] == ["OSError: gone", "not ended in time"]


def test_the_decode_server_has_cores_of_its_own_where_there_are_two():
    assert split({3}) == ({3}, {3})
    assert split({0, 1}) == ({1}, {0})
    assert split({0, 1, 2, 5}) == ({2, 5}, {0, 1})


def test_good_cells_have_no_problem_and_show_the_harvest():
    good = results(cell(SERVE, late=1), cell(HARLI, late=1), cell(SERVE, 2), cell(HARLI, 2))
    assert judge.problems(good) == []
    assert judge.harvests(good) == [0.4, 0.4] and judge.efficiencies(good) == [0.8, 0.8]
    text = page.page(good, judge.rows(good), [])
    assert "99.5%" in text and "Nothing fails." in text


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ((cell(SERVE), cell(HARLI, late=2)), "requests within target: 0.9800"),
        ((cell(SERVE), cell(HARLI, failures=["OSError: gone"])), "1 requests failed: OSError: gone"),
        ((cell(SERVE, failures=["late"]), cell(HARLI)), "serve-only pair, repetition 1: 1 requests failed"),
        ((cell(SERVE), cell(HARLI, disturbed="noise")), "no two cells to compare"),
        ((cell(SERVE), cell(HARLI, tokens_per_s=0.0)), "nothing was trained"),
    ],
)
def test_each_statement_can_fail(cells, says):
    found = judge.problems(results(*cells))
    assert any(says in problem for problem in found), found
    assert says in page.page(results(*cells), judge.rows(results(*cells)), found)

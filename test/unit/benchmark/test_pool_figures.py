"""The arithmetic behind the pool's benchmark and stress test: the trace, the verdicts, the table
and the picture."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import stress_pool
from pool import judge as bench_pool_judge
from pool import picture, stress_traffic, trace
from pool.judge import MODES, PLAIN, SPLITS, UNIFIED, judge
from pool.trace import Seen

HALF, FIFTH = SPLITS


def row(**changes: Any) -> dict[str, Any]:
    clean = {
        "requests": 25,
        "failed": {},
        "retracted": {},
        "hit_rate": 0.3,
        "decode_ms": 20.0,
        "ttft_ms": 300.0,
        "peak_tokens": 4093,
        "cached_again": 4085,
        "tokens_per_s": 100.0,
        "pool": None,
        "sums": True,
        "grown_bytes": 90 * 2**20,
    }
    return clean | changes


def results() -> dict[str, Any]:
    """Those of a run in which everything holds."""
    pool = {"reclaims": 7, "reclaim_ms": {"p50": 3.0, "max": 9.0, "last": 2.0}}
    refused = {"3.0": "HTTP 400: longer than the pool"}
    return {
        "capacity": {
            "saved": {"whole": 11, "least": 10, HALF: 5, FIFTH: 1, UNIFIED: 11},
            "kept": {"whole": 8, "least": 6, HALF: 3, FIFTH: 1, UNIFIED: 7},
        },
        "launches": [
            {
                PLAIN: row(tokens_per_s=None),
                HALF: row(peak_tokens=2045, cached_again=2037, failed=refused),
                FIFTH: row(peak_tokens=3273, cached_again=3265, failed=refused),
                UNIFIED: row(pool=pool),
            }
        ],
    }


def test_everything_holds_where_it_does():
    assert [s for s in judge(results()) if not s.holds] == []


Change = Callable[[dict[str, Any]], Any]


def of(mode: str, **changes: Any) -> Change:
    return lambda found: found["launches"][0][mode].update(changes)


def capacity(kind: str, **changes: int) -> Change:
    return lambda found: found["capacity"][kind].update(changes)


def reclaims(**changes: Any) -> Change:
    return lambda found: found["launches"][0][UNIFIED]["pool"].update(changes)


# What is wrong in the results, and words of the statement that must be false then.
FAULTS: list[tuple[Change, str]] = [
    (capacity("saved", **{UNIFIED: 10}), "the whole budget allows"),
    (capacity("saved", **{UNIFIED: 12}), "the whole budget allows"),
    (capacity("kept", **{UNIFIED: 5}), "with kept activations too"),
    (capacity("saved", **{HALF: 11}), f"{HALF} does not fit"),
    (capacity("kept", **{FIFTH: 7}), f"{FIFTH} does not fit"),
    (of(UNIFIED, peak_tokens=4092), "as many cached tokens"),
    (of(UNIFIED, cached_again=0), "as many cached tokens"),
    (of(HALF, peak_tokens=4093), f"{HALF} does not reach"),
    (of(FIFTH, peak_tokens=4093), f"{FIFTH} does not reach"),
    (of(PLAIN, failed={"2.0": "HTTP 500"}), "SGLang alone serves the whole trace"),
    (of(UNIFIED, failed={"2.0": "HTTP 500"}), "no request is rejected"),
    (of(UNIFIED, requests=24), "no request is rejected"),
    (of(UNIFIED, retracted={"2.0": 1}), "no request is retracted"),
    (reclaims(reclaim_ms={"p50": 20.0}), "in less than a decode step"),
    (reclaims(reclaim_ms={"p50": None}), "in less than a decode step"),
    (reclaims(reclaims=0), "in less than a decode step"),
    (of(UNIFIED, pool=None), "in less than a decode step"),
    (of(UNIFIED, sums=False), "parts give its total"),
    (of(UNIFIED, grown_bytes=347 * 2**20), "resident memory stays"),
    (of(UNIFIED, tokens_per_s=0.0), "training goes on"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_each_statement_fails_where_it_does_not_hold(change, words):
    found = results()
    change(found)
    assert [s.text for s in judge(found) if not s.holds and words in s.text]


def test_every_statement_has_a_fixture_that_breaks_it():
    for statement in judge(results()):
        assert any(words in statement.text for _, words in FAULTS), statement.text


def test_a_fault_in_one_of_two_launches_is_found_and_named():
    found = results()
    found["launches"].append(copy.deepcopy(found["launches"][0]))
    found["launches"][1][UNIFIED]["failed"] = {"0.1": "aborted: no memory"}
    (wrong,) = [s for s in judge(found) if not s.holds]
    assert "(launch 2)" in wrong.text and "0.1: aborted" in wrong.found


def test_a_retraction_that_sglang_makes_too_is_none_of_ours():
    found = results()
    for mode in (PLAIN, UNIFIED):
        found["launches"][0][mode]["retracted"] = {"2.0": 1}
    assert all(s.holds for s in judge(found))
    found["launches"][0][UNIFIED]["retracted"] = {"2.0": 2}
    assert [s.text for s in judge(found) if not s.holds] == [
        "no request is retracted that SGLang alone does not retract"
    ]


def test_the_table_has_a_column_for_each_mode_and_says_what_failed():
    found = results()
    of(UNIFIED, sums=False)(found)
    text = bench_pool_judge.table(found, judge(found))
    assert text.splitlines()[0] == "| | " + " | ".join(MODES) + " |"
    assert "| largest micro-batch, saved inputs, rows | - | 5 | 1 | 11 |" in text
    assert "| finetune tokens/s | - | 100 | 100 | 100 |" in text
    assert text.count("| NO |") == 1


def test_the_picture_is_xml_with_a_bar_for_each_value():
    found = results()
    root = ElementTree.fromstring(picture.svg(found))
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "26"]
    assert len(bars) == sum(len(values) for _, values in picture.panels(found)) == 14
    assert all(float(bar.get("width") or 0) > 0 for bar in bars)


# ------------------------------------------------------------------ the trace
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(512, 4096), st.integers(1, 6))
def test_a_trace_fits_the_pool_wave_by_wave(seed, pool, waves):
    made = trace.trace(seed, pool, 4096, waves, 1.0)
    assert len(made) == waves and made == trace.trace(seed, pool, 4096, waves, 1.0)
    for wave in made:
        assert 0.8 * pool < wave.slots < 0.95 * pool
        assert all(ask.tokens > 1 and len(ask.prompt) > 1 for ask in wave.asks)
        assert all(10 <= token < 4096 for ask in wave.asks for token in ask.prompt)


def test_a_long_prompt_fits_no_split_and_the_shared_beginnings_are_shared():
    made = trace.trace(1, 4096, 4096, 8, 1.0)
    (longest,) = next(wave for wave in made if wave.kind == "long").asks
    assert len(longest.prompt) > max(SPLITS.values()) * 4096
    shared = [ask for wave in made if wave.kind == "shared" for ask in wave.asks]
    beginnings = {ask.prompt[:100] for ask in shared}
    assert len(shared) == 32 and len(beginnings) == 2
    assert trace.trace(2, 4096, 4096, 8, 1.0) != made


def test_what_requests_saw_is_summed_up():
    seen = [
        Seen("0.0", prompt_tokens=100, cached_tokens=50, tokens=3, ttft_s=0.2, gaps_s=[0.01, 0.03]),
        Seen("0.1", prompt_tokens=100, tokens=2, retractions=1, ttft_s=0.4, gaps_s=[0.02]),
        Seen("1.0", error="HTTP 400"),
    ]
    found = trace.summary(seen)
    assert found["failed"] == {"1.0": "HTTP 400"} and found["retracted"] == {"0.1": 1}
    assert found["hit_rate"] == 0.25 and found["decode_ms"] == 20.0 and found["requests"] == 3
    assert found["ttft_ms"] == 300.0
    assert trace.summary([])["decode_ms"] is None


def test_peak_tokens_are_read_from_sglangs_own_lines():
    log = (
        "Prefill batch, #new-seq: 1, #new-token: 9, #cached-token: 0, #token: 5, token usage: 0.00\n"
        "Decode batch, #running-req: 1, #token: 4093, token usage: 1.00\nDecode batch, #token: 17, x\n"
    )
    assert trace.peak(log) == 4093
    assert trace.peak("") == 0


# ------------------------------------------------------------------ the stress test
def part(**changes: Any) -> dict[str, Any]:
    jobs = {name: [] for name in ("lost", "doubled", "differing", "failed", "losses")}
    clean = {
        "seconds": 300.0,
        "requests": 200,
        "cut": 30,
        "failed_requests": [],
        "differing": [],
        "jobs": {"acknowledged": 9, "statuses": {"succeeded": 8, "cancelled": 1}, **jobs},
        "pool": {
            "total_bytes": (stress_pool.POOL_TOKENS + 1) * 512,  # and the padded page
            "kv_bytes": 512,
            "train_bytes": 0,
            "by_owner": {"kv": (stress_pool.POOL_TOKENS + 1) * 512, "state": 0},
            "reclaims": 40,
            "reclaim_ms": {"p50": 1.0, "max": 3.0},
        },
        "looks": {"count": 500, "wrong": 0, "most_lent": 1_000_000},
        "flushed": 3,
        "caps": {"applied": 20},
        "log": [],
        "alive": True,
    }
    for name, value in changes.items():
        clean[name] = clean[name] | value if isinstance(value, dict) else value
    return clean


STRESS_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"failed_requests": ["HTTP 500"]}, "a request failed: HTTP 500"),
    ({"differing": ["question 3"]}, "an answer differs"),
    *(
        ({"jobs": {name: ["j"]}}, f"job {name}")
        for name in ("lost", "doubled", "differing", "failed", "losses")
    ),
    ({"looks": {"wrong": 1}}, "did not give its total"),
    ({"looks": {"count": 0}}, "did not give its total"),
    ({"looks": {"most_lent": 0}}, "memory did not move"),
    ({"pool": {"reclaims": 0}}, "memory did not move"),
    ({"pool": {"train_bytes": 4096}}, "memory is not back"),
    ({"pool": {"by_owner": {"kv": 1, "kept": 4096}}}, "memory is not back"),
    ({"pool": {"kv_bytes": 8192}}, "memory is not back"),
    ({"log": ["Traceback"]}, "in the log"),
    ({"alive": False}, "the server has ended"),
]


@pytest.mark.parametrize(("change", "words"), STRESS_FAULTS, ids=[words for _, words in STRESS_FAULTS])
def test_each_fault_of_a_stress_run_is_one_problem(change, words):
    parts = {"fixed": part(), "free": part(**change)}
    (problem,) = stress_pool.verdict(parts)
    assert problem.startswith("free") and words in problem
    assert "1 problems" in stress_pool.table(parts, [problem])


def test_a_clean_stress_run_has_no_problem():
    parts = {"fixed": part(), "free": part()}
    assert stress_pool.verdict(parts) == []
    assert "Verdict: clean." in stress_pool.table(parts, [])


def test_losses_are_the_same_to_the_bit_or_within_a_tolerance():
    losses = {1: 2.0, 2: 1.5}
    assert stress_pool.same_losses(dict(losses), losses, 0.0)
    assert not stress_pool.same_losses({1: 2.0, 2: 1.5000001}, losses, 0.0)
    assert stress_pool.same_losses({1: 2.0, 2: 1.5000001}, losses, 1e-3)
    assert not stress_pool.same_losses({1: 2.0}, losses, 1e-3)
    assert not stress_pool.same_losses({1: 2.0, 2: float("nan")}, losses, 1e-3)


def test_answers_are_compared_token_by_token():
    reference = [5, 6, 7, 8]
    assert stress_traffic.fault([5, 6], reference, 2, ended=True) is None
    assert stress_traffic.fault([5], reference, 2, ended=True) == "1 tokens came, 2 were asked for"
    assert stress_traffic.fault([5], reference, 2, ended=False) is None
    assert stress_traffic.fault([], reference, 2, ended=False) is None
    assert stress_traffic.fault([5, 9], reference, 4, ended=False) == "token 1 of 2 is 9 and was 6"


@given(st.integers(0, 2**31), st.floats(20, 2000))
def test_the_tide_flows_and_ebbs_until_the_end(seed, seconds):
    spells = stress_traffic.tide(seed, seconds)
    assert spells == stress_traffic.tide(seed, seconds) and spells[0][0] == 0.0
    assert all(0 <= a < b <= seconds for a, b in spells)
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spells))


def test_the_catalogue_shares_beginnings_and_fits_the_pool():
    questions = stress_traffic.catalogue(1, 4096, 509)
    assert questions == stress_traffic.catalogue(1, 4096, 509)
    longest = max(len(question.prompt) for question in questions)
    assert 0.85 * 4096 < longest < 4096 - stress_traffic.MOST_TOKENS - 8
    assert len({question.prompt[:300] for question in questions[:18]}) == 3

"""The arithmetic behind the co-location benchmark, beside its judge: noise, load, plan, table and
picture."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.colocate_cells import REQUESTS, TARGETS, Found, cell, late, of, results
from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import bench_colocate
from colocate import busy as colocate_busy
from colocate import calibrate, client, noise, picture, plan
from colocate import judge as colocate_judge
from colocate import report as colocate_report
from colocate.judge import (
    BURST,
    DEFAULT,
    FAILS,
    HARLI,
    IDLE,
    NICE,
    PAUSED,
    PLAIN_LOOP,
    SERVE,
    SHIFT,
    SLICES,
    TRAIN,
    UNCOORDINATED,
    judge,
)
from common import report

# ------------------------------------------------------------------ noise
REFERENCE = {"count": 10.0, "read": 4.0}
CLEAN = {
    "stolen": 0.0,
    "foreign": 0.01,
    "before_count": 10.0,
    "after_count": 10.5,
    "before_read": 4.9,
    "after_read": 4.0,
}


def test_the_noise_rule():
    assert noise.why(CLEAN, REFERENCE) is None
    assert noise.why({**CLEAN, "foreign": None}, REFERENCE) is None
    for change in (
        *({"stolen": 0.03}, {"foreign": 0.06}),
        *({"before_count": 12.6}, {"after_count": 13.0}, {"before_read": 5.1}, {"after_read": 8.0}),
    ):
        assert noise.why({**CLEAN, **change}, REFERENCE)


def test_a_cell_is_watched_by_what_the_pieces_of_work_take_around_it():
    pieces = noise.Pieces()
    for best, calm in ((1e6, True), (1e-6, False)):
        watch = noise.Watch(pieces, {"read": best})
        watch.begin()
        found = watch.end()
        assert found["before_count"] > 0 and found["after_read"] > 0
        assert found["why"] is None or not calm or "piece" not in found["why"]
        assert calm or found["why"]


class Scripted(noise.Pieces):
    """Pieces of work of given lengths."""

    def __init__(self, *counts_ms: float) -> None:
        self._counts_ms = list(counts_ms)

    def ms(self) -> dict[str, float]:
        return {"count": self._counts_ms.pop(0), "read": 4.0}


class PiecesOnly(noise.Watch):
    """Sees the pieces of work and no processors' time, which on this machine the tests beside this
    one use."""

    def _look(self) -> tuple[tuple[float, float, float], float]:
        return (0.0, 0.0, 0.0), 0.0


def test_the_reference_is_the_machine_as_it_usually_is_while_rates_are_calibrated():
    watch = PiecesOnly(Scripted(4.2, 5.3, 5.5, 5.2, 6.4, 6.8))
    for _ in range(2):  # a fast minute at first
        watch.begin()
        assert watch.end()["why"] is None
    assert watch.calibrated() == {"count": 5.25, "read": 4.0}
    watch.begin()
    assert "6.8 ms after it" in watch.end()["why"]


def test_a_run_without_loads_has_a_reference_too():
    watch = PiecesOnly(Scripted(5.0))
    assert watch.calibrated() == {"count": 5.0, "read": 4.0}


def test_ticks_of_proc_stat():
    assert noise.ticks("cpu  100 20 30 400 50 1 2 7 0 0") == (610.0, 153.0, 7.0)


# ------------------------------------------------------------------ the load client
def test_what_bench_serving_says_of_each_request():
    details = {
        "output_lens": [4, 2, 0, 4],
        "ttfts": [0.1, 0.2, 0.0, 0.3],
        "itls": [[0.01, 0.02, 0.03], [0.01], [], [0.01, 0.01, 0.01]],
        "errors": ["", "", "boom", "cut off"],
    }
    found = client.seen(details, [4, 4, 4, 4])
    assert found["tpots_ms"] == [20.0, None, None, None]  # too few tokens, failed, failed
    assert found["ttfts_ms"] == [100.0, 200.0, None, None]
    assert found["late"] == 3 and found["tokens"] == [4, 4, 4, 4] and len(found["gaps_ms"]) == 7


def test_a_token_whose_bytes_are_no_text_yet_is_seen():
    said = {"text": "", "meta_info": {"completion_tokens": 1}}
    assert client.loads(json.dumps(said))["text"]
    for left_alone in (
        {"text": "", "meta_info": {"completion_tokens": 0}},
        {**said, "text": "a"},
        ["text"],
        {},
    ):
        assert client.loads(json.dumps(left_alone)) == left_alone


def test_bench_servings_command_line():
    load = client.Load(10, math.inf, 7, 128, 64, 0.5, concurrency=1)
    words = load.arguments("http://x", Path("m"), Path("o.jsonl"))
    pairs = dict(itertools.pairwise(words))
    assert pairs["--request-rate"] == "inf" and pairs["--max-concurrency"] == "1" and pairs["--seed"] == "7"
    assert {"--output-details", "--flush-cache", "--tokenize-prompt"} <= set(words)


# ------------------------------------------------------------------ totals and rates
def test_growth_between_two_moments_is_interpolated():
    points = [(0.0, 0.0), (10.0, 100.0), (20.0, 120.0)]
    assert colocate_busy.between(points, 5.0, 15.0) == pytest.approx(60.0)
    assert colocate_busy.between(points, -5.0, 30.0) == pytest.approx(120.0)
    assert colocate_busy.between([], 0.0, 1.0) == 0.0


def test_the_busy_meter_adds_up_turns_with_a_batch(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.01, 7.0])
    monkeypatch.setattr(colocate_busy.time, "monotonic", lambda: next(clock))
    meter = colocate_busy.Meter(str(tmp_path / "busy"))
    for busy in (False, True, True, False):
        meter.end_turn(busy=busy)
    points = colocate_busy.read(tmp_path / "busy")
    assert points == [(1.0, 0.0), (3.0, 2.0), (7.0, 2.01)]  # no line within a twentieth of a second


@given(st.floats(0.05, 0.9), st.floats(0.01, 5.0))
def test_rates_and_busy_shares_are_inverse(busy, service_s):
    rate = calibrate.offered(busy, service_s)
    assert calibrate.served(busy, rate) == pytest.approx(service_s)


# ------------------------------------------------------------------ the plan
def planned(*words: str) -> tuple[Any, Found]:
    options = bench_colocate.parse(list(words))
    loads = [load for load in options.loads if load]
    found: Found = {"calibration": {"loads": {str(load): {"rate": 2.0, "tpot_ms": 10.0} for load in loads}}}
    found["cells"] = []
    found["targets"] = {str(load): plan.targets_of(options, 10.0) for load in loads}
    found["baseline"] = plan.baseline_of(dict.fromkeys(found["targets"], 10.0), found["targets"])
    return options, found


def test_the_full_run_covers_every_mode_load_and_target():
    options, found = planned()
    cells = plan.plan(options, found, 1)
    names = {(c.mode, c.load, c.setting) for c in cells}
    assert {(HARLI, load, label) for load in (40, 60, 80) for label in TARGETS} <= names
    assert {(mode, load, "") for mode in (SERVE, PAUSED) for load in (40, 60, 80)} <= names
    assert {c.mode for c in cells} == set(colocate_judge.MODES) and len(names) == len(cells)
    assert found["baseline"] == {"load": 40, "target": "2x"}
    apart = {c.requests for c in cells if c.mode in colocate_judge.SEPARATE}
    ours = [c for c in cells if c.setting == "2x" + colocate_judge.APART + colocate_judge.FEW]
    assert [(c.mode, c.load, {c.requests}) for c in ours] == [(HARLI, 40, apart)]
    assert (
        options.requests * options.repetitions >= 400
        and options.baseline_requests * options.repetitions == 120
    )
    rows = {(c.mode, c.load) for c in cells}
    assert {(HARLI, BURST), (SERVE, BURST), (HARLI, SHIFT)} <= rows


def test_cells_are_measured_load_by_load_each_once_in_an_order_of_its_own():
    options, found = planned()
    cells = plan.plan(options, found, 1)
    orders = [plan.in_blocks(cells, random.Random(seed)) for seed in range(20)]
    for order in orders:
        assert len(order) == len(cells) and set(order) == set(cells)
        loads = [cell.load for cell in order]
        assert sum(a != b for a, b in itertools.pairwise(loads)) == len(set(loads)) - 1
        for n, apart in enumerate(order):  # they end by what serve-only took
            if apart.mode in colocate_judge.SEPARATE:
                alone = [c for c in order[:n] if c.mode == SERVE and c.load == apart.load]
                assert any(c.requests == apart.requests for c in alone)
    assert len({tuple(order) for order in orders}) > 10


def not_ended(count: int) -> list[float | None]:
    return [None] * count + [10.0] * (REQUESTS - count)


def test_a_setting_that_kept_next_to_nothing_is_not_measured_again():
    options, found = planned()
    before = {(c.mode, c.setting) for c in plan.plan(options, found, 1)}
    found["cells"] = [
        cell(SERVE, 40, colocate_judge.FEW),
        cell(UNCOORDINATED, 40, "2 threads", tpots_ms=not_ended(5)),  # keeps 35 of 40
        cell(NICE, 40, "1 thread", tpots_ms=not_ended(4)),
        cell(SLICES, 40, "5 ms", tpots_ms=not_ended(40)),
    ]
    after = {(c.mode, c.setting) for c in plan.plan(options, found, 2)}
    assert before - after == {(UNCOORDINATED, "2 threads")} and after <= before


def test_the_quick_run_covers_what_is_asked_of_it():
    options, found = planned("--quick")
    names = {(c.mode, c.load, c.setting) for c in plan.plan(options, found, 1)}
    assert {
        (HARLI, 40, "1.5x"),
        (HARLI, 40, "4x"),
        (SERVE, 40, ""),
        (TRAIN, IDLE, ""),
        (HARLI, IDLE, DEFAULT),
    } <= names
    assert {m for m, _, _ in names} == {SERVE, TRAIN, PLAIN_LOOP, HARLI, NICE} and options.repetitions == 3


def test_the_gpu_run_has_absolute_targets_and_no_second_copy_of_the_weights():
    options, found = planned("--device", "cuda", "--quick")
    cells = plan.plan(options, found, 1)
    assert {c.mode for c in cells} == {SERVE, TRAIN, HARLI, SLICES} and options.model_size == "8b"
    assert sorted(c.target_ms for c in cells if c.mode == HARLI and c.load) == [20.0, 30.0, 50.0]
    assert found["baseline"]["target"] == "20 ms"


def test_what_was_disturbed_is_measured_again_until_there_are_the_requests_asked_for():
    options, found = planned("--repetitions", "3", "--requests", str(REQUESTS), "--loads", "40,80")
    found["cells"] = results()["cells"]
    assert plan.plan_lacking(options, found, 4) == []
    of(HARLI, 40, "2x", disturbed=lambda c: "stolen" if c["repetition"] == 2 else None)(found)
    again = plan.plan_lacking(options, found, 4)
    assert {(c.mode, c.load, c.setting) for c in again} == {(SERVE, 40, ""), (HARLI, 40, "2x")}
    of(SERVE, 80, disturbed=lambda c: "stolen" if c["repetition"] == 1 else None)(found)
    again = plan.plan_lacking(options, found, 4)
    assert {c.setting for c in again if c.load == 80} == {"", *TARGETS}
    assert {c.repetition for c in again} == {4} and {c.requests for c in again} == {REQUESTS}


def test_a_run_goes_on_from_its_file_under_the_same_options_only(tmp_path, capsys):
    file, machine = tmp_path / "full.json", report.meta_info() | {"commit": "abc1234"}
    file.write_text(json.dumps({"results": results(), "meta_info": machine}))
    options = bench_colocate.parse(["--loads", "idle,40,80", "--resume", str(file)])
    assert options.begun["commits"] == ["abc1234"] and options.begun["repetitions_done"] == 3
    for flags, words in (
        (["--loads", "idle,40"], "targets there: {'40': ['1.5x', '2x', '4x'], '80': ['1.5x', '2x', '4x']}"),
        (["--loads", "40,80", "--targets", "2"], "asked for: {'40': ['2x'], '80': ['2x']}"),
        (["--quick"], "asked for: {'40': ['1.5x', '4x']}"),
        (["--model-size", "tiny"], "model_size there: '25m'; asked for: 'tiny'"),
    ):
        with pytest.raises(SystemExit):
            bench_colocate.parse([*flags, "--resume", str(file)])
        assert words in capsys.readouterr().err
    older = results() | {"noise_rule": "one piece of work"}
    for written, where, words in (
        (older, machine, "noise_rule there: 'one piece of work'"),
        (results(), machine | {"cpu": "Another 9000"}, "cpu there: 'Another 9000'; this machine's: "),
        (results(), machine | {"cores": 4096}, "cores there: 4096; this machine's: "),
    ):
        file.write_text(json.dumps({"results": written, "meta_info": where}))
        with pytest.raises(SystemExit):
            bench_colocate.parse(["--loads", "idle,40,80", "--resume", str(file)])
        assert words in capsys.readouterr().err
    for text in ("", "[]", '{"results": {"device": "cpu"}}'):
        file.write_text(text)
        with pytest.raises(SystemExit):
            bench_colocate.parse(["--resume", str(file)])
        assert f"--resume {file}: not a file that --json wrote" in capsys.readouterr().err


# ------------------------------------------------------------------ what is printed
def test_the_page_says_everything_once():
    found = results()
    of(HARLI, 40, "2x", tpots_ms=late(6))(found)
    rows = judge(found)
    text = colocate_report.page(found, rows)
    table = [
        line
        for line in text.splitlines()
        if line.startswith("| 40 (measured 40.0%)") or "| two processes |" in line
    ]
    assert (
        len(table) == 2
        and "2x: 0.0%" in text
        and text.count("| FAILS |") == sum(r.verdict == FAILS for r in rows) == 1
    )
    assert "40%: 10.20 ms, of which the targets are 1.5x 1.47, 2x 1.96, 4x 3.92" in text
    assert "late" in text  # the 99th percentile of a cell where some did not end
    assert "two processes: no setting keeps" in text and "nice 19: best setting" in text
    assert "sittings" not in text
    found["commits"] = ["abc1234", "def5678"]
    assert "Measured in 2 sittings" in colocate_report.page(found, rows)
    json.dumps(found)


def test_a_line_for_the_terminal():
    line = colocate_report.line(cell(SERVE, 40, busy=0.41, disturbed="x"))
    assert "40 requests in 20 s" in line and "busy 41.0%" in line and "disturbed: x" in line


def test_the_picture_is_xml_with_a_point_for_each_setting_and_load():
    found = results()
    text = picture.svg(found)
    assert text is not None
    root = ElementTree.fromstring(text)
    count = len([e for e in root.iter("{http://www.w3.org/2000/svg}circle") if e.get("class") == "point"])
    assert count == sum(len(picture.points(found, load)) for load in (40, 80)) == 11
    assert picture.svg({**found, "targets": {}}) is None

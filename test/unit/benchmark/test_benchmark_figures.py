"""The arithmetic behind the benchmarks' verdicts."""

from __future__ import annotations

import math
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import bench_overhead
from common import load, servers

logs = st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=10)


def test_interval_of_three_launches_uses_students_t():
    values = [math.log(1.00), math.log(1.01), math.log(1.02)]
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    found = bench_overhead.interval(values)
    assert found["ratio"] == pytest.approx(1.00997, abs=1e-5)
    assert found["lower"] == pytest.approx(math.exp(statistics.fmean(values) - half), abs=1e-5)
    assert found["upper"] == pytest.approx(math.exp(statistics.fmean(values) + half), abs=1e-5)


@given(logs)
def test_interval_encloses_its_ratio(values):
    found = bench_overhead.interval(values)
    assert found["lower"] <= found["ratio"] <= found["upper"]


def test_log_ratio_compares_within_rounds():
    # The machine doubles its speed half way: pairs of one round do not see it.
    assert bench_overhead.log_ratio([2.2, 2.2, 1.1, 1.1], [2.0, 2.0, 1.0, 1.0]) == pytest.approx(
        math.log(1.1)
    )


@pytest.mark.parametrize(
    ("lower", "control_upper", "fails"),
    [(1.01, 1.00, False), (1.03, 1.00, True), (1.03, 1.04, False), (1.02, 1.00, False)],
)
def test_verdict_needs_the_limit_and_the_control_to_be_passed(lower, control_upper, fails):
    ours = {"ratio": lower, "lower": lower, "upper": lower + 0.01}
    control = {"ratio": 1.0, "lower": 0.99, "upper": control_upper}
    assert bench_overhead.verdict(ours, control) is fails


def test_the_fixed_batch_is_the_same_every_time():
    body = bench_overhead.batch_body(8, 48, 4096)
    assert body == bench_overhead.batch_body(8, 48, 4096)
    assert len(body["input_ids"]) == 8
    assert body["sampling_params"]["ignore_eos"]


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (90, 90), (99, 99), (100, 100)])
def test_percentile_is_the_nearest_rank(percent, value):
    assert load.percentile([float(n) for n in range(1, 101)], percent) == value


def test_percentile_of_one():
    assert load.percentile([7.0], 99) == 7.0


def test_attainment_counts_the_target_itself_as_met():
    assert load.attainment([10.0, 30.0, 30.1, 50.0], 30.0) == 0.5


def test_flags_for_a_plain_server_leave_lora_out_unless_asked():
    limits = {
        "device": "cpu",
        "max_total_tokens": 4096,
        "context_length": None,
        "disable_overlap_schedule": True,
        "disable_radix_cache": False,
        "enable_lora": True,
        "lora_target_modules": ["v_proj", "q_proj"],
        "max_total_num_tokens": 4096,
    }
    plain = ["--device", "cpu", "--max-total-tokens", "4096", "--disable-overlap-schedule"]
    assert servers.flags_for(limits, lora=False) == plain
    lora = ["--enable-lora", "--lora-target-modules", "q_proj", "v_proj"]
    assert servers.flags_for(limits, lora=True) == plain + lora

"""The arithmetic behind the soak's verdict."""

from __future__ import annotations

import sys

import pytest

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

from sglang_harli.protocol.public import Event
from survive import checkpoints, report
from survive.chaos import plan
from survive.jobs import told_twice
from survive.traffic import Seen, excused
from survive.watch import Life, Sample, in_life, over_run

MB = 10**6


def life(role: str, memory, lived_s: int, files=lambda age: 20) -> Life:
    samples = [Sample(age, int(memory(age) * MB), files(age)) for age in range(0, lived_s + 1, 5)]
    return Life(role, 1, samples)


def event(kind: str, at: float = 0.0, **data) -> Event:
    return Event(id=1, job="j", created_at=at, level="info", type=kind, message="", data=data)


def test_a_short_life_is_not_judged_and_set_up_does_not_count_as_growth():
    assert in_life(life("service", lambda age: 100, 299)) is None
    found = in_life(life("service", lambda age: min(age, 170), 600))
    assert found is not None and found["memory_growth"] == 0


def test_growth_within_a_life_is_found():
    found = in_life(life("scheduler", lambda age: 1000 + age / 2, 900, lambda age: 20 + age // 30))
    assert found is not None
    assert found["memory_growth"] == pytest.approx((1435 - 1105) / 1105, abs=0.01)
    assert found["files_growth"] > report.FILES_GROWTH


def test_lives_of_a_role_are_compared_at_equal_age():
    lives = [life("service", lambda age: 80 + age / 10, 200), life("service", lambda age: 88 + age / 10, 95)]
    found = over_run(lives, "service")
    assert found is not None and found["age_s"] == 90.0
    assert found["memory_growth"] == pytest.approx(8 / 87.5, abs=0.005)
    assert over_run(lives[:1], "service") is None
    assert over_run(lives, "http") is None


def test_a_life_that_was_older_as_the_watch_began_is_not_compared_at_that_age():
    late = life("http", lambda age: 80, 200)
    late.samples = [sample for sample in late.samples if sample.age_s > 100]
    early = life("http", lambda age: 88, 95)
    assert over_run([late, early], "http") is None
    found = over_run([late, early, early], "http")
    assert found is not None and found["lives"] == 2 and found["memory_growth"] == 0


def results(**changes):
    jobs = {name: [] for name in ("lost", "doubled", "differing", "failed")}
    clean = {
        "jobs": {"acknowledged": 3, "statuses": {"succeeded": 3}, **jobs},
        "requests": 9,
        "adapter_requests": 2,
        "in_flight_when_killed": 1,
        "failed_requests": [],
        "kills": {"everything": 1, "service": 2, "stalls": 0},
        "service_back_s": [3.0, 4.0],
        "stalls_back_s": [],
        "restarts_s": [40.0],
        "seconds": 300,
        "checkpoints": None,
    }
    return clean | changes


def test_a_clean_run_has_no_problem_and_each_fault_is_one():
    assert report.verdict(results(), [], judged=True) == []
    faults = results(failed_requests=["base: HTTP 500"], service_back_s=[3.0, 10.5])
    faults["jobs"]["lost"] = ["j"]
    assert len(report.verdict(faults, [], judged=True)) == 3


def test_growth_counts_in_long_runs_only():
    lives = [life("scheduler", lambda age: 1000 + age, 900)]
    assert report.verdict(results(), lives, judged=False) == []
    assert len(report.verdict(results(), lives, judged=True)) == 1
    text = report.table(results(growth=report.growth(lives)), [], judged=True)
    assert "scheduler" in text and "clean" in text


def test_a_request_is_excused_only_where_the_server_was_killed_under_it():
    seen = Seen(10.0, 12.0)
    assert excused(seen, [11.0]) and not excused(seen, [9.9, 12.1])


def test_plans_are_the_same_for_a_seed_and_hit_everything_at_least_once():
    assert plan(1, 1800) == plan(1, 1800) != plan(2, 1800)
    for seconds in (120, 300, 1800):
        blows = plan(3, seconds)
        assert "everything" in [blow.what for blow in blows]
        assert all(0 < blow.at_s < seconds for blow in blows)
    assert {blow.what for blow in plan(1, 1800)} == {"service", "everything", "stall"}


def test_what_is_told_twice_is_found():
    once = [event("job_created"), event("started"), event("step_metrics", attempt=1, step=1)]
    end = [event("adapter_published"), event("succeeded")]
    assert list(told_twice([*once, *end])) == []
    assert list(told_twice([*once, *end, *end])) == ["2 times adapter_published", "2 times succeeded"]
    assert list(told_twice([*once, *end, event("resumed")])) == ["it was run again after its end"]
    again = event("step_metrics", attempt=1, step=1)
    assert list(told_twice([*once, again])) == ["step 1 of attempt 1 counted 2 times"]
    assert list(told_twice([*once, event("step_metrics", attempt=2, step=1)])) == []


def test_gaps_that_overlap_a_checkpoint_are_told_from_the_others():
    events = [event("step_metrics", 10.0 + n, step=n) for n in range(6)]
    events.append(event("checkpoint_saved", 12.5, step=2))
    found = checkpoints.summary(events, [(11.0, 0.010), (12.2, 0.030), (12.51, 0.050), (99.0, 9.0)])
    assert found["checkpoints"] == 1 and found["save_s"] == [0.5]
    assert found["during"]["count"] == 2 and found["during"]["p99"] == 50.0
    assert found["beside"]["count"] == 1 and found["beside"]["max"] == 10.0
    assert checkpoints.quantiles([]) == {"count": 0}

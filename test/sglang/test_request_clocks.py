"""When a request's first and latest token went out, read from SGLang's own time stats, retracted or
not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.config import HarliOptions
from sglang_harli.managers.scheduler.policy.serving_state import ServingState

CAME_S = 1000.0


@pytest.fixture
def side() -> ServingState:
    return ServingState(HarliOptions(tpot_slo_ms=50.0))


@pytest.fixture
def req() -> Any:
    """A request whose three tokens went out 10.0, 10.1 and 10.2 s after it came."""
    from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

    stats = SchedulerReqTimeStats()
    stats.set_wait_queue_entry_time(CAME_S)
    stats.set_forward_entry_time(CAME_S + 1)
    stats.set_prefill_finished_time(CAME_S + 10.0)
    for after_s in (10.1, 10.2):
        stats.set_last_decode_finish_time(CAME_S + after_s)
    return SimpleNamespace(time_stats=stats, output_ids=[1, 2, 3], ended=False)


def clock_of(side: ServingState, req: Any) -> Any:
    req.finished = lambda: req.ended
    [clock] = side.clocks([req])
    return clock


def retract_and_prefill(req: Any) -> None:
    """As SGLang does; nobody looks at the request meanwhile.  Its fourth token goes out 15 s after
    it came."""
    stats = req.time_stats
    stats.set_wait_queue_entry_time(CAME_S + 11.0)
    stats.set_forward_entry_time(CAME_S + 14.0)
    stats.set_prefill_finished_time(CAME_S + 15.0)
    req.output_ids.append(4)


def test_a_clock_has_the_first_and_the_latest_token(side, req):
    clock = clock_of(side, req)
    assert (clock.first_token_s, clock.last_token_s, clock.emitted) == (CAME_S + 10.0, CAME_S + 10.2, 3)


def test_a_request_that_was_retracted_before_anything_trained_has_banked_nothing(side, req):
    retract_and_prefill(req)
    clock = clock_of(side, req)
    assert (clock.first_token_s, clock.last_token_s, clock.emitted) == (CAME_S + 10.0, CAME_S + 15.0, 4)
    assert side.slack([clock], 100, CAME_S + 15.0, 0.0).seconds < -4  # 5 s for what was due in 0.2 s
    req.time_stats.set_last_decode_finish_time(CAME_S + 15.1)
    assert clock_of(side, req).last_token_s == CAME_S + 15.1


def test_the_gap_bound_runs_from_the_token_of_the_second_prefill(req):
    side = ServingState(HarliOptions(tpot_slo_ms=1e6, max_itl_ms=200.0))
    retract_and_prefill(req)
    assert side.slack([clock_of(side, req)], 100, CAME_S + 15.0, 0.0).seconds > 0


def test_a_request_that_ends_with_its_second_prefill_missed_its_target(side, req):
    retract_and_prefill(req)
    req.ended = True
    req.finished = lambda: req.ended
    assert side.count_finished([req]) == 1
    assert (side.attainment.finished, side.attainment.met) == (1, 0)

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
    [clock], unclocked = side.clocks([req])
    assert not unclocked
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


# ------------------------------------------------------------------ a decode server of a pair
@pytest.fixture
def sent() -> Any:
    """A request whose prompt was computed elsewhere: its KV is here 3 s after it came, its first
    result of this server goes out then, and two tokens follow."""
    from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

    stats = SchedulerReqTimeStats()
    stats.set_wait_queue_entry_time(CAME_S + 2.9)
    stats.set_forward_entry_time(CAME_S + 2.95)
    return SimpleNamespace(rid="sent", time_stats=stats, output_ids=[1], ended=False)


def result(side: ServingState, req: Any, at_s: float) -> None:
    """As SGLang does behind ``get_new_prebuilt_batch``."""
    side.joined([req])
    req.time_stats.set_decode_prebuilt_finish_time(CAME_S + at_s)


def test_a_clock_of_a_decode_server_runs_from_its_own_first_result(side, sent):
    result(side, sent, 3.0)
    clock = clock_of(side, sent)
    assert (clock.first_token_s, clock.last_token_s, clock.emitted) == (CAME_S + 3.0, CAME_S + 3.0, 1)
    for after_s in (3.1, 3.2):
        sent.time_stats.set_last_decode_finish_time(CAME_S + after_s)
        sent.output_ids.append(2)
    clock = clock_of(side, sent)
    assert (clock.first_token_s, clock.last_token_s, clock.emitted) == (CAME_S + 3.0, CAME_S + 3.2, 3)


def test_one_that_was_retracted_there_keeps_its_first_token_though_nobody_looked_at_it(side, sent):
    result(side, sent, 3.0)
    sent.time_stats.set_retract_time(CAME_S + 4.0)
    sent.output_ids.append(2)
    result(side, sent, 9.0)
    clock = clock_of(side, sent)
    assert (clock.first_token_s, clock.emitted) == (CAME_S + 3.0, 2)


def test_requests_that_join_have_banked_nothing_as_behind_a_prefill(side, sent):
    for _ in range(100):
        side.quiet.decode()
    long = side.quiet.steps
    result(side, sent, 3.0)
    assert side.quiet.steps < long


def test_a_request_without_a_clock_is_counted_once_and_is_not_left_out(side, sent, caplog):
    sent.finished = lambda: sent.ended
    for _ in range(3):
        assert side.clocks([sent]) == ([], 1)
    assert side.status()["requests_without_clock"] == 1
    assert "when request sent got its first token" in caplog.text
    sent.ended = True
    assert side.count_finished([sent]) == 1
    assert (side.attainment.finished, side.attainment.met) == (1, 0)  # not known to have met anything


def test_a_request_that_has_no_token_yet_has_no_clock_and_needs_none(side, sent):
    sent.output_ids, sent.finished = [], lambda: False
    assert side.clocks([sent]) == ([], 0)
    assert side.unclocked == 0


def test_no_first_token_is_promised_where_none_is_computed(caplog):
    side = ServingState(HarliOptions(ttft_slo_ms=300.0), prefills=False)
    assert side.targets.ttft_s is None and side.targets.idle_quantum_s == 0.15
    assert "ttft-slo-ms is not promised here" in caplog.text
    from sglang_harli.protocol import internal

    answer = side.set_options(internal.SetOptions(request=1, values={"ttft_slo_ms": 200.0}))
    assert answer.outcome == "applied" and "not promised here" in answer.text
    assert side.targets.ttft_s is None and side.targets.idle_quantum_s == 0.1

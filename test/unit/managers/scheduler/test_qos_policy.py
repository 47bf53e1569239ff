"""The policy and the ledger as pure functions: tables, properties, and a small simulation of the
loop."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.config import HarliOptions
from sglang_harli.core import QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.serving_state import DISTURBED, ServingState, targets_of
from sglang_harli.managers.scheduler.policy.slo_ledger import (
    IDLE_SEEN_S,
    KEPT_S,
    KEPT_SHARE,
    UNBOUNDED,
    Attainment,
    PlainProgress,
    PrefillReserve,
    QuietSteps,
    Slack,
    Targets,
    batch_slack,
    expecting,
    spare,
)
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.protocol.internal import SetOptions

TARGETS = Targets(tpot_s=0.05, ttft_s=None, max_itl_s=None, busy_quantum_s=0.1, idle_quantum_s=0.25)


def offer(*candidates: tuple[int, float], kind: QuantumKind = QuantumKind.BACKWARD) -> QuantumOffer:
    return QuantumOffer(kind, candidates)


def test_a_waiting_prompt_stops_training():
    decision = qos_policy.decide(
        StepLoad(running=1, waiting=1), Slack(9.0, "tpot"), offer((1, 0.001)), TARGETS
    )
    assert (decision.quanta, decision.reason) == (0, Reason.PREFILL_WAITING)
    assert qos_policy.decide(StepLoad(waiting=1), UNBOUNDED, offer((1, 0.001)), TARGETS).quanta == 0


def test_idle_takes_the_largest_that_stays_under_the_idle_bound():
    decision = qos_policy.decide(StepLoad(), UNBOUNDED, offer((1, 0.1), (2, 0.2), (4, 0.4)), TARGETS)
    assert (decision.quanta, decision.rows, decision.reason) == (1, 2, Reason.IDLE)


def test_idle_runs_the_least_quantum_even_when_it_exceeds_the_bound():
    assert qos_policy.decide(StepLoad(), UNBOUNDED, offer((1, 3.0), (2, 6.0)), TARGETS).rows == 1


def test_a_row_over_the_busy_bound_waits_for_idle_time_and_says_so():
    decision = qos_policy.decide(StepLoad(running=1), Slack(9.0, "tpot"), offer((1, 0.11)), TARGETS)
    assert (decision.quanta, decision.reason) == (0, Reason.TOO_LONG)


def test_slack_is_named_by_the_promise_that_is_tightest():
    decision = qos_policy.decide(StepLoad(running=1), Slack(0.001, "itl"), offer((1, 0.01)), TARGETS)
    assert decision.reason == qos_policy.NO_SLACK["itl"]


@given(
    running=st.integers(0, 64),
    waiting=st.integers(0, 3),
    slack=st.floats(-1, 10),
    costs=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6),
)
def test_a_quantum_under_load_never_exceeds_slack_or_bound(running, waiting, slack, costs):
    candidates = tuple(enumerate(sorted(costs), start=1))
    decision = qos_policy.decide(
        StepLoad(running=running, waiting=waiting), Slack(slack, "tpot"), offer(*candidates), TARGETS
    )
    assert decision.reason
    assert decision.quanta in (0, 1)
    if waiting:
        assert decision.quanta == 0
    elif running and decision.quanta:
        upper = dict(candidates)[decision.rows]
        assert upper <= slack and upper <= TARGETS.busy_quantum_s
        assert not any(
            r > decision.rows and u <= min(slack, 0.1) for r, u in candidates
        )  # the largest that fits


SIZES = offer((1, 0.010), (2, 0.014), (4, 0.024))


@pytest.mark.parametrize(
    ("later_quantum_s", "decode_penalty_s", "rows"),
    [
        (0.030, 0.0, 0),  # four rows train 1.67 times as much per second as one
        (0.015, 0.0, 0),  # two rows come within reach, at 1.43 times
        (0.0139, 0.0, 1),  # nothing larger does
        (-math.inf, 0.0, 1),  # by default nobody waits
    ],
)
def test_training_waits_for_a_size_that_is_worth_it(later_quantum_s, decode_penalty_s, rows):
    slack = Slack(0.012, "tpot", later_quantum_s, decode_penalty_s)
    decision = qos_policy.decide(StepLoad(running=1), slack, SIZES, TARGETS)
    assert decision.rows == rows
    assert decision.reason == (Reason.SLACK if rows else Reason.BANKING)


def test_what_training_costs_the_next_step_counts_against_short_quanta():
    sizes = offer((1, 0.010), (2, 0.0195))
    alone, charged = (Slack(0.012, "tpot", 1.0, decode_penalty_s) for decode_penalty_s in (0.0, 0.003))
    assert qos_policy.decide(StepLoad(running=1), alone, sizes, TARGETS).rows == 1
    assert qos_policy.decide(StepLoad(running=1), charged, sizes, TARGETS).reason == Reason.BANKING


def test_a_quantum_that_takes_no_time_runs_wherever_there_is_slack():
    """Of a kind that has not been measured, and whose first estimate is nothing."""
    for sizes in (offer((1, 0.0)), offer((1, 0.0), (2, 0.0)), offer((1, 0.0), (2, 0.01))):
        decision = qos_policy.decide(StepLoad(running=1), Slack(1e-9, "tpot", 1.0), sizes, TARGETS)
        assert decision.quanta == 1 and decision.reason == Reason.SLACK


@given(
    slack=st.floats(-1, 1),
    more=st.floats(0, 1),
    toll=st.floats(0, 0.01),
    costs=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6),
)
def test_waiting_is_for_something_that_would_fit_and_is_better(slack, more, toll, costs):
    candidates = tuple(enumerate(sorted(costs), start=1))
    load, later = StepLoad(running=1), Slack(slack, "tpot", slack + more, toll)
    decision = qos_policy.decide(load, later, offer(*candidates), TARGETS)
    greedy = qos_policy.decide(load, Slack(slack, "tpot"), offer(*candidates), TARGETS)
    if decision.reason != Reason.BANKING:
        assert decision == greedy
        return
    assert greedy.quanta
    now = greedy.rows / (dict(candidates)[greedy.rows] + toll)
    assert any(
        rows > greedy.rows and upper <= slack + more and rows / (upper + toll) > now
        for rows, upper in candidates
    )


def expected(slack: Slack, *, decode_s: float = 0.0385, idle_comes: bool = False) -> Slack:
    return expecting(
        slack,
        TARGETS,
        decode_s=decode_s,
        steps_between_prefills=8,
        decode_penalty_s=0.002,
        idle_comes=idle_comes,
    )


def test_slack_grows_by_what_a_decode_step_leaves_of_the_target():
    slack = expected(Slack(0.01, "tpot"))
    assert (slack.seconds, slack.decode_penalty_s, slack.idle_comes) == (0.01, 0.002, False)
    assert slack.later_quantum_s == pytest.approx(0.01 + 4 * (0.05 * (1 - KEPT_SHARE) - 0.0385))
    assert (
        expected(Slack(0.08, "tpot")).later_quantum_s == TARGETS.busy_quantum_s
    )  # no longer quantum runs beside it
    for held in (Slack(0.01, "itl"), Slack(0.01, "ttft")):  # those do not grow with the tokens that come
        assert expected(held) is held
    slow = Slack(0.01, "tpot")
    assert expected(slow, decode_s=0.06) is slow


def test_where_idle_time_comes_its_quanta_are_waited_for():
    for bound in ("tpot", "itl", "ttft"):
        slack = expected(Slack(0.01, bound), idle_comes=True)
        assert (slack.seconds, slack.later_quantum_s, slack.idle_comes) == (0.01, float("-inf"), True)
    plenty = expected(Slack(TARGETS.idle_quantum_s, "tpot"), idle_comes=True)  # enough is banked
    assert not plenty.idle_comes and plenty.later_quantum_s == TARGETS.busy_quantum_s


@given(seconds=st.floats(-1, 1), rows=st.integers(1, 4))
def test_where_idle_time_comes_only_what_is_banked_beyond_its_longest_quantum_is_spent(seconds, rows):
    sizes = offer(*((n, 0.01 * n) for n in range(1, rows + 1)))
    slack = expected(Slack(seconds, "tpot"), idle_comes=True)
    decision = qos_policy.decide(StepLoad(running=1), slack, sizes, TARGETS)
    assert bool(decision.quanta) == (seconds >= TARGETS.idle_quantum_s)
    if not decision.quanta:
        fits = seconds >= 0.01
        assert decision.reason == (Reason.IDLE_COMES if fits else qos_policy.NO_SLACK["tpot"])
    assert qos_policy.decide(StepLoad(), slack, sizes, TARGETS).rows == rows, "and idle time is used"


@given(
    seconds=st.floats(-1, 1),
    decode_s=st.floats(0.001, 0.06),
    idle_comes=st.booleans(),
    costs=st.lists(st.floats(1e-3, 0.2), min_size=1, max_size=4),
)
def test_a_refusal_stands_for_the_steps_that_nobody_asks_again(seconds, decode_s, idle_comes, costs):
    sizes = offer(*enumerate(sorted(costs), start=1))
    slack = expected(Slack(seconds, "tpot"), decode_s=decode_s, idle_comes=idle_comes)
    decision = qos_policy.decide(StepLoad(running=1), slack, sizes, TARGETS)
    unasked = qos_policy.ask_again_after(decision, slack)
    assert 0 <= unasked <= qos_policy.MOST_UNASKED
    for step in range(1, unasked + 1):
        banked_s = seconds + step * spare(TARGETS, decode_s)
        later = expected(Slack(banked_s, "tpot"), decode_s=decode_s, idle_comes=idle_comes)
        assert not qos_policy.decide(StepLoad(running=1), later, sizes, TARGETS).quanta


def test_a_refusal_that_a_prompt_or_another_promise_made_is_asked_again_at_once():
    for load, slack in (
        (StepLoad(running=1, waiting=1), Slack(-1.0, "tpot")),
        (StepLoad(running=1), Slack(-1.0, "itl")),
        (StepLoad(running=1), Slack(-1.0, "ttft")),
        (StepLoad(running=1), Slack(0.0101, "tpot", 1.0, slack_gain_s=0.02)),  # banking for the next size
    ):
        decision = qos_policy.decide(load, slack, SIZES, TARGETS)
        assert not decision.quanta and qos_policy.ask_again_after(decision, slack) == 0
    assert qos_policy.ask_again_after(decision, Slack(-1.0, "tpot", slack_gain_s=0.02)) == 0


def test_idle_time_that_was_seen_lately_is_expected_again():
    side = ServingState(HarliOptions())
    clocks = [PlainProgress(0.0, 0.0, 1)]
    assert not side.slack(clocks, 100, 0.01, 0.0).idle_comes
    side.idle_s = 10.0
    assert side.slack([PlainProgress(11.0, 11.0, 1)], 100, 11.0, 0.0).idle_comes
    later_quantum_s = 10.0 + IDLE_SEEN_S
    late = side.slack([PlainProgress(later_quantum_s, later_quantum_s, 1)], 100, later_quantum_s, 0.0)
    assert not late.idle_comes and late.seconds < side.targets.idle_quantum_s


def test_quiet_steps_follow_the_requests_that_come():
    quiet = QuietSteps(first=8.0)
    assert quiet.steps == 8.0
    for _ in range(100):
        for _ in range(3):
            quiet.decode()
        quiet.prefill()
        quiet.prefill()  # of the same arrivals
    assert quiet.steps == pytest.approx(3.0, abs=0.01)
    for _ in range(40):
        quiet.decode()
    assert quiet.steps == 40


def test_slack_counts_banked_time_decode_reserve_and_queued_training():
    clock = PlainProgress(first_token_s=10.0, last_token_s=10.02, emitted=4)
    slack = batch_slack([clock], TARGETS, now_s=10.03, decode_upper_s=0.01, reserve_s=0.02, queued_s=0.005)
    assert math.isclose(
        slack.seconds, 10.0 + 4 * 0.05 * (1 - KEPT_SHARE) - KEPT_S - 10.03 - 0.01 - 0.02 - 0.005
    )
    assert slack.bound == "tpot"


def test_the_itl_cap_binds_although_time_is_banked():
    targets = Targets(tpot_s=0.05, ttft_s=None, max_itl_s=0.08, busy_quantum_s=0.1, idle_quantum_s=0.25)
    clock = PlainProgress(first_token_s=0.0, last_token_s=1.0, emitted=100)
    slack = batch_slack([clock], targets, now_s=1.0, decode_upper_s=0.01, reserve_s=0.0)
    assert slack.bound == "itl" and math.isclose(slack.seconds, 0.07)


def test_more_is_kept_for_a_decode_step_while_a_checkpoint_is_written():
    side = ServingState(HarliOptions(max_itl_ms=60))
    for _ in range(20):
        side.step(BatchLoad(True, 1, 300, 1, 300), 0.015, 0.0)
    clocks = [PlainProgress(0.0, 10.0, 300)]
    quiet, disturbed = (side.slack(clocks, 300, 10.0, 0.0, disturbed=d) for d in (False, True))
    more = (DISTURBED - 1) * side.predictor.decode(1, 300).upper_s
    assert quiet.seconds - disturbed.seconds == pytest.approx(more)


def test_an_empty_batch_is_unbounded():
    assert batch_slack([], TARGETS, now_s=0.0, decode_upper_s=1.0, reserve_s=1.0) == UNBOUNDED


def test_the_reserve_is_the_recent_maximum_of_summed_prefills_and_decays():
    reserve = PrefillReserve(half_life_s=1.0)
    reserve.prefill(0.02)
    reserve.prefill(0.03)
    reserve.decode(now_s=100.0)
    assert math.isclose(reserve.seconds(100.0), 0.05)
    reserve.prefill(0.01)
    reserve.decode(now_s=101.0)
    assert math.isclose(reserve.seconds(101.0), 0.025)


def test_prompts_one_after_the_other_put_a_batch_further_behind():
    reserve = PrefillReserve(half_life_s=1.0)
    for number in range(6):  # every other step one of 30 ms
        if number % 2:
            reserve.prefill(0.03)
        reserve.decode(now_s=float(number) / 1e6)
    assert math.isclose(reserve.seconds(0.0), 0.03, rel_tol=1e-3), "each for itself"
    assert math.isclose(reserve.seconds(0.0, spare_s=0.0), 0.09, rel_tol=1e-3)
    assert math.isclose(reserve.seconds(0.0, spare_s=-1.0), 0.09, rel_tol=1e-3), "no more than what came"
    assert math.isclose(reserve.seconds(0.0, spare_s=0.005), 0.09 - 5 * 0.005, rel_tol=1e-3)
    assert math.isclose(reserve.seconds(1.0, spare_s=0.0), 0.045, rel_tol=1e-3)


@given(
    hold_ups=st.lists(st.sampled_from((0.0, 0.0, 0.02, 0.05)), min_size=1, max_size=32),
    spare_s=st.floats(0.0, 0.05),
)
def test_the_reserve_is_what_prompts_put_a_batch_behind(hold_ups, spare_s):
    """Never more; less by what the steps leave that a row lacks to the next span."""
    reserve = PrefillReserve()
    for seconds in hold_ups:
        if seconds:
            reserve.prefill(seconds)
        reserve.decode(0.0)
    behind, most = 0.0, 0.0
    for seconds in hold_ups:
        behind += seconds
        most = max(most, behind)
        behind = max(behind - spare_s, 0.0)
    kept = reserve.seconds(0.0, spare_s)
    assert max(hold_ups) - 1e-9 <= kept <= most + 1e-9
    assert kept >= most - (len(hold_ups) - 1) * spare_s - 1e-9


def test_attainment_is_a_mean_over_the_request():
    attainment = Attainment()
    attainment.count(PlainProgress(0.0, 0.50, 11), 0.05)
    attainment.count(PlainProgress(0.0, 0.51, 11), 0.05)
    attainment.count(PlainProgress(0.0, 0.0, 1), 0.05)  # one token has no gap
    assert (attainment.finished, attainment.met) == (3, 2)


@given(seed=st.integers(0, 200), arrivals=st.floats(0.2, 4.0))
def test_no_request_turns_late_when_predictions_hold(seed, arrivals):
    """A simulation of the loop: decode 10 ms, prefill 15 ms, quanta as predicted.

    A request that serving alone would finish on time is on time with training beside it, as long as
    the prefills that arrive together are no longer than the reserve that the ledger has seen
    before: here two, which arrivals at least 50 ms apart guarantee.
    """
    rng = random.Random(seed)
    jobs, at = [], 0.0
    for _ in range(20):
        at += 0.05 + rng.expovariate(arrivals)
        jobs.append((at, rng.randint(2, 40)))
    alone = _simulate(jobs, train=False)
    beside = _simulate(jobs, train=True)
    late = [i for i, (a, b) in enumerate(zip(alone, beside, strict=True)) if a and not b]
    assert not late


def _simulate(jobs: list[tuple[float, int]], *, train: bool) -> list[bool]:
    decode_s, prefill_s = 0.010, 0.015
    now, waiting, running, done = 0.0, list(enumerate(jobs)), {}, {}
    reserve = PrefillReserve(half_life_s=1e9)
    reserve.prefill(2 * prefill_s)
    reserve.decode(0.0)
    quiet, idle_s = QuietSteps(), -math.inf
    quantum = offer((1, 0.012), (2, 0.020), (4, 0.036))
    while waiting or running:
        if waiting and waiting[0][1][0] <= now:
            index, (_, tokens) = waiting.pop(0)
            now += prefill_s
            quiet.prefill()
            running[index] = [now, now, 1, tokens]
        elif running:
            now += decode_s
            quiet.decode()
            for index, row in list(running.items()):
                row[1], row[2] = now, row[2] + 1
                if row[2] >= row[3]:
                    done[index] = row[1] - row[0] <= (row[2] - 1) * TARGETS.tpot_s
                    del running[index]
        elif not train:
            now = waiting[0][1][0]
            continue
        while train:
            load = StepLoad(running=len(running), waiting=bool(waiting and waiting[0][1][0] <= now))
            idle_s = now if load.idle else idle_s
            clocks = [PlainProgress(r[0], r[1], r[2]) for r in running.values()]
            slack = batch_slack(
                clocks, TARGETS, now_s=now, decode_upper_s=decode_s, reserve_s=reserve.seconds(now)
            )
            slack = expecting(
                slack,
                TARGETS,
                decode_s=decode_s,
                steps_between_prefills=quiet.steps,
                decode_penalty_s=0.0,
                idle_comes=now - idle_s < IDLE_SEEN_S,
            )
            decision = qos_policy.decide(load, slack, quantum, TARGETS)
            if not decision.quanta or not (waiting or running):
                break
            now += dict(quantum.candidates)[decision.rows]
    return [done[i] for i in range(len(jobs))]


def test_set_options_answers_applied_stale_and_conflict():
    side = ServingState(HarliOptions())
    applied = side.set_options(SetOptions(request=1, values={"tpot_slo_ms": 30.0}))
    assert (applied.outcome, applied.revision, applied.effective["tpot_slo_ms"]) == ("applied", 1, 30.0)
    assert applied.effective["max_quantum_ms"] == 60.0 and side.targets.tpot_s == 0.03
    stale = side.set_options(SetOptions(request=2, values={"tpot_slo_ms": 20.0}, if_revision=0))
    assert (stale.outcome, stale.effective["tpot_slo_ms"]) == ("stale", 30.0)
    conflict = side.set_options(SetOptions(request=3, values={"max_itl_ms": 10.0}))
    assert conflict.outcome == "conflict" and side.options.max_itl_ms is None
    assert side.set_options(SetOptions(request=4, values={"run_dir": 1.0})).outcome == "conflict"
    assert side.set_options(SetOptions(request=5, values={"tpot_slo_ms": -1.0})).outcome == "conflict"


def test_targets_follow_the_options():
    targets = targets_of(HarliOptions(tpot_slo_ms=40, ttft_slo_ms=100, max_itl_ms=70))
    assert targets.busy_quantum_s == 0.05 and targets.idle_quantum_s == 0.05


@pytest.mark.parametrize("load", [StepLoad(1, 10, unclocked=1), StepLoad(5, 100, promised=2, unclocked=3)])
def test_a_running_request_without_a_clock_stops_training(load):
    decision = qos_policy.decide(load, Slack(10.0, "tpot"), offer((1, 0.001)), TARGETS)
    assert (decision.quanta, decision.reason) == (0, Reason.NO_CLOCK)

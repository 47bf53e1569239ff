"""The spatial policy as a pure function: what fits, monotony, hysteresis, and the published
card."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.core import Reason, RungOffer, SmSplit, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import (
    KEPT_S,
    KEPT_SHARE,
    PlainProgress,
    Slack,
    Targets,
    batch_slack,
)
from sglang_harli.simulation.devices import ada_rungs, finetune_rate

TARGETS = Targets(tpot_s=0.04, ttft_s=None, max_itl_s=None, busy_quantum_s=0.08, idle_quantum_s=0.25)
BUSY = StepLoad(running=4, context_tokens=4000)
QUANTUM_S = 0.005


@st.composite
def ladders(draw) -> list[RungOffer]:
    rungs = draw(
        st.lists(
            st.tuples(st.floats(0.005, 0.06), st.floats(1.01, 1.6), st.floats(1.0, 120.0)),
            min_size=1,
            max_size=8,
        )
    )
    pause_s = draw(st.floats(0.005, 0.05))
    offers = [RungOffer(SmSplit(142, 0), pause_s, pause_s, 0.0)]
    return offers + [RungOffer(SmSplit(100, 42), alone, alone * k, rate) for alone, k, rate in rungs]


def choose(offers: list[RungOffer], slack_s: float, **kwargs) -> qos_policy.RungChoice:
    return qos_policy.choose_rung(
        BUSY, Slack(slack_s, "tpot"), offers, kwargs.pop("targets", TARGETS), quantum_s=QUANTUM_S, **kwargs
    )


def step_s(offers: list[RungOffer], choice: qos_policy.RungChoice) -> float:
    offer = offers[choice.rung]
    return offer.alone_s + choice.train_s * (1 - offer.alone_s / offer.beside_s)


def ada(batch: int, context: int, model: str = "proportional") -> list[RungOffer]:
    offers = []
    for rung in ada_rungs():
        alone_s = rung.alone_s(batch, context)
        offers.append(
            RungOffer(rung.split, alone_s, alone_s * rung.stretch, finetune_rate(model, rung.split))
        )
    return offers


@given(
    offers=ladders(),
    slack_s=st.floats(-0.1, 0.3),
    current=st.none() | st.integers(0, 8),
    quiet=st.floats(1, 50),
)
def test_training_is_launched_only_where_the_step_fits(offers, slack_s, current, quiet):
    choice = choose(offers, slack_s, current=current, steps_between_prefills=quiet)
    assert choice.reason
    assert 0 <= choice.rung < len(offers)
    if choice.train_s:
        assert step_s(offers, choice) <= slack_s + 1e-9
        assert choice.train_s <= offers[choice.rung].beside_s
        assert choice.reason == Reason.SLACK
    else:
        assert offers[choice.rung].alone_s == min(offer.alone_s for offer in offers)
        assert choice.reason == qos_policy.NO_SLACK["tpot"]


@given(
    offers=ladders(),
    slacks=st.tuples(st.floats(-0.1, 0.3), st.floats(-0.1, 0.3)),
    current=st.none() | st.integers(0, 8),
    quiet=st.floats(1, 50),
)
def test_more_slack_never_means_less_training(offers, slacks, current, quiet):
    less, more = sorted(slacks)
    low, high = (choose(offers, slack_s, steps_between_prefills=quiet) for slack_s in (less, more))
    assert high.rate >= low.rate * (1 - 1e-9)
    low, high = (
        choose(offers, slack_s, current=current, steps_between_prefills=quiet) for slack_s in (less, more)
    )
    assert (
        high.rate >= low.rate / (1 + qos_policy.STAY) - 1e-9
    )  # hysteresis may keep a rung that is nearly as good


@given(
    offers=ladders(),
    banked=st.lists(st.floats(-0.05, 0.3), min_size=1, max_size=8),
    emitted=st.integers(1, 200),
    current=st.none() | st.integers(0, 8),
    cap=st.none() | st.floats(0.04, 0.2),
)
def test_no_decision_turns_an_on_time_request_late(offers, banked, emitted, current, cap):
    """A request that gets its next token on time from serving alone gets it on time beside
    training."""
    targets = Targets(0.04, None, cap, 0.08, 0.25)
    pace, now_s = targets.tpot_s * (1 - KEPT_SHARE), 100.0
    clocks = [PlainProgress(now_s + bank - (emitted - 1) * pace, now_s, emitted) for bank in banked]
    slack = batch_slack(clocks, targets, now_s=now_s, decode_upper_s=0.0, reserve_s=0.0)
    choice = qos_policy.choose_rung(BUSY, slack, offers, targets, quantum_s=QUANTUM_S, current=current)
    alone_s = min(offer.alone_s for offer in offers)
    took_s = step_s(offers, choice)
    for clock in clocks:
        due_s = clock.first_token_s + clock.emitted * pace - KEPT_S
        if cap is not None:
            due_s = min(due_s, clock.last_token_s + cap)
        if now_s + alone_s <= due_s:
            assert now_s + took_s <= due_s + 1e-9


@given(offers=ladders(), slack_s=st.floats(0.005, 0.3), current=st.integers(0, 8))
def test_the_rung_in_force_stays_unless_another_is_clearly_better(offers, slack_s, current):
    free, held = choose(offers, slack_s), choose(offers, slack_s, current=current)
    if held.rung != free.rung:
        assert held.rung == current
        assert free.rate <= held.rate * (1 + qos_policy.STAY)


def test_a_burst_jumps_many_rungs_in_one_decision():
    light, heavy = ada(8, 8 * 1200), ada(84, 84 * 1250)
    before = choose(light, 0.036)
    assert light[before.rung].split == SmSplit(28, 112)
    after = choose(heavy, 0.036, current=before.rung)
    assert heavy[after.rung].split.finetune <= 8
    back = choose(light, 0.036, current=after.rung)
    assert light[back.rung].split == SmSplit(28, 112)


def test_banked_time_buys_a_larger_rung():
    offers = ada(62, 62 * 1260)
    steady, banked = choose(offers, 0.0388), choose(offers, 0.0388 + 0.015)
    assert banked.rate > 1.5 * steady.rate
    assert step_s(offers, banked) > 0.0388


def test_training_that_saturates_takes_the_fastest_rung_with_the_full_rate():
    offers = ada(16, 16 * 1200, "saturating")
    choice = choose(offers, 0.0388)
    full = [o for o in offers if o.rate == 56.0]
    assert offers[choice.rung].beside_s == min(o.beside_s for o in full)


def test_a_cap_on_gaps_is_not_banked_against():
    """A rung that is longer than the cap can never be paid for: nothing is saved up for it."""
    targets = Targets(0.04, None, 0.0395, 0.08, 0.25)
    offers = ada(62, 62 * 1260)
    assert choose(offers, 0.0388, targets=targets).train_s > 0


def test_idle_trains_the_most_and_a_waiting_prompt_pauses():
    offers = ada(1, 100)
    idle = qos_policy.choose_rung(StepLoad(), Slack(0.0, "none"), offers, TARGETS, quantum_s=QUANTUM_S)
    assert offers[idle.rung].rate == 112.0 and idle.reason == Reason.IDLE
    waiting = StepLoad(running=1, context_tokens=100, waiting=1)
    paused = qos_policy.choose_rung(waiting, Slack(1.0, "tpot"), offers, TARGETS, quantum_s=QUANTUM_S)
    assert paused.train_s == 0.0 and paused.reason == Reason.PREFILL_WAITING

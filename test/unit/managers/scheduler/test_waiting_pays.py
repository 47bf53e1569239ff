"""Waiting for better quanta never starves training, whatever the arrivals, and makes nobody
late."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.core import QuantumKind, QuantumOffer
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack, Targets
from sglang_harli.managers.scheduler.policy.waiting_pays import HALF_LIFE_S, WaitingPays
from sglang_harli.simulation import policies
from sglang_harli.simulation.devices import TimeSharedDevice
from support.serving_loop import Arrivals, Clients, EverySteps, InTime, Served, device, drawn, serve

LEAST = 0.8  # of what both rules off get
SPAN_S = 60.0  # over any such span
DEVICE = device(decode_s=0.010, quantum_s=0.005, row_s=0.005)  # quanta of 1 to 4 rows


def targets_of(tpot_s: float) -> Targets:
    return Targets(tpot_s, None, None, busy_quantum_s=2 * tpot_s, idle_quantum_s=0.25)


def ours(
    tpot_s: float, arrivals: Arrivals, rig: TimeSharedDevice = DEVICE, seconds: float = SPAN_S
) -> Served:
    return serve(rig, policies.HarliTemporal(rig, targets_of(tpot_s)), arrivals, seconds)


def nothing_waited_for(*args: object, **kwargs: object) -> Served:
    """The same with both rules off: whatever fits is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qos_policy, "WORTH_WAITING", float("inf"))
        patch.setattr(policies, "IDLE_SEEN_S", 0.0)
        return ours(*args, **kwargs)  # type: ignore[arg-type]


def alone(arrivals: Arrivals, rig: TimeSharedDevice = DEVICE, seconds: float = SPAN_S) -> Served:
    return serve(rig, policies.ServeOnly(), arrivals, seconds)


def late(served: Served, tpot_s: float) -> set[float]:
    return {one.at_s for one in served.finished if one.late(targets_of(tpot_s))}


@pytest.mark.parametrize("steps", [6, 8])
def test_requests_at_even_intervals_do_not_starve_training(steps):
    """A decode step of 10 ms, a target of 13: the next larger quantum is always about to fit, and
    then a request comes."""
    seconds = 3 * SPAN_S
    waits = ours(0.013, EverySteps(steps, 30), seconds=seconds)
    takes = nothing_waited_for(0.013, EverySteps(steps, 30), seconds=seconds)
    assert takes.trained() > 1000
    for begin_s in (0.0, 20.0, 40.0, 60.0, 120.0):
        span = begin_s, begin_s + SPAN_S
        assert waits.trained(*span) >= LEAST * takes.trained(*span)
    assert not late(waits, 0.013) and not late(alone(EverySteps(steps, 30)), 0.013)


@settings(max_examples=12, deadline=None)
@given(
    steps=st.integers(3, 24),
    tpot_s=st.sampled_from((0.0125, 0.013, 0.0135, 0.014, 0.015, 0.017, 0.02, 0.03)),
    prefill_s=st.sampled_from((0.0, 0.004, 0.01)),
)
def test_at_whatever_intervals(steps, tpot_s, prefill_s):
    rig = device(0.010, 0.005, 0.005, prefill_s)
    waits, takes = (run(tpot_s, EverySteps(steps, 30), rig) for run in (ours, nothing_waited_for))
    few = 4 * steps  # so little that a span's end decides
    assert waits.trained() >= LEAST * takes.trained() - few
    assert not late(waits, tpot_s) or late(alone(EverySteps(steps, 30), rig), tpot_s)


def poisson(gap_s: float, seed: int, least_s: float = 0.0) -> InTime:
    return InTime(
        drawn(seed, lambda rng: least_s + rng.expovariate(1 / (gap_s - least_s))),
        drawn(seed + 1, lambda rng: rng.randint(20, 40)),
    )


def clients(count: int, think_s: float, seed: int) -> Clients:
    return Clients(
        count,
        drawn(seed, lambda rng: rng.expovariate(1 / think_s)),
        drawn(seed + 1, lambda rng: rng.randint(10, 60)),
    )


def idle_now_and_then(gap_s: float, seed: int) -> InTime:
    """One long answer at a time, and less than two seconds from one spell of idle time to the
    next."""
    return InTime(drawn(seed, lambda rng: gap_s * rng.uniform(0.9, 1.1)), drawn(0, lambda _: int(90 * gap_s)))


@pytest.mark.parametrize("tpot_s", [0.014, 0.02, 0.03])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: poisson(0.15, seed),
        lambda seed: poisson(0.3, seed),
        lambda seed: clients(4, 0.3, seed),
        lambda seed: idle_now_and_then(1.8, seed),
    ],
    ids=["busy", "half busy", "closed loop", "rare idle time"],
)
def test_training_gets_its_share_of_any_load(make: Callable[[int], Arrivals], tpot_s: float):
    """Mean of three loads of a kind, over one span each."""
    gets = [
        (ours(tpot_s, make(seed)).trained(), nothing_waited_for(tpot_s, make(seed)).trained())
        for seed in (1, 11, 21)
    ]
    assert sum(waits for waits, _ in gets) >= 0.95 * sum(takes for _, takes in gets)
    assert all(waits >= LEAST * takes > 0 for waits, takes in gets)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gap_s=st.sampled_from((0.15, 0.2, 0.3, 0.5)),
    tpot_s=st.sampled_from((0.014, 0.02, 0.03)),
)
def test_nobody_who_was_on_time_is_late(seed, gap_s, tpot_s):
    """Prompts that do not come together, as far as the reserve has seen them."""
    rig = device(0.010, 0.005, 0.005, prefill_s=0.01)
    make = lambda: poisson(gap_s, seed, least_s=0.1)  # noqa: E731
    assert late(ours(tpot_s, make(), rig), tpot_s) <= late(alone(make(), rig), tpot_s)


OFFER = QuantumOffer(QuantumKind.BACKWARD, ((1, 0.010), (2, 0.015), (4, 0.025)))
BEST_S = 0.025 / 4


def test_what_fits_and_does_not_run_is_counted_once():
    waits, slack = WaitingPays(), Slack(0.012, "tpot", decode_penalty_s=0.001)
    waits.begin()
    waits.could(OFFER, slack, 1.0, 0.0)
    assert not waits.pays
    for now_s in (0.001, 0.002):
        waits.begin()
        waits.could(OFFER, slack, 1.0, now_s)  # it would have been spent before
    waits.ran(OFFER, 1, slack)
    assert waits.pays
    waits.could(OFFER, Slack(0.002, "tpot"), 1.0, 0.003)  # what ran has left
    assert waits.pays


def test_a_larger_quantum_makes_up_for_what_was_let_pass():
    waits = WaitingPays()
    waits.could(OFFER, Slack(0.011, "tpot"), 1.0, 0.0)
    waits.could(OFFER, Slack(0.014, "tpot"), 1.0, 0.0)
    waits.could(OFFER, Slack(0.026, "tpot"), 1.0, 0.0)  # two rows after the one before
    assert not waits.pays
    waits.ran(OFFER, 4, Slack(0.026, "tpot"))
    assert waits.pays


def test_the_bound_between_two_tokens_holds_for_what_could_run_too():
    waits = WaitingPays()
    waits.could(OFFER, Slack(9.0, "tpot"), 0.026, 0.0)
    waits.ran(OFFER, 4, Slack(9.0, "tpot"))
    assert waits.pays


def test_the_past_fades():
    waits = WaitingPays()
    waits.ran_idle(OFFER, 4, 0.0)
    for n in range(20):
        waits.ran_idle(OFFER, 4, 0.01 * n)
    now_s = 4 * HALF_LIFE_S
    for n in range(3):
        waits.prefilled()
        waits.could(OFFER, Slack(0.011, "tpot"), 1.0, now_s + n)
    assert not waits.pays


@given(seed=st.integers(0, 10_000))
def test_taking_whatever_fits_always_counts_as_much(seed):
    """So training that has stopped waiting catches up."""
    rng, waits, banked_s = random.Random(seed), WaitingPays(), 0.0
    for step in range(200):
        banked_s = min(banked_s + rng.uniform(0.0, 0.008), 0.06)
        if rng.random() < 0.1:
            waits.prefilled()
            banked_s = 0.0
        waits.begin()
        room_s = 0.05
        while True:
            slack = Slack(banked_s, "tpot")
            waits.could(OFFER, slack, room_s, 0.01 * step)
            fits = [c for c in OFFER.candidates if c[1] <= min(banked_s, room_s)]
            if not fits:
                break
            waits.ran(OFFER, fits[-1][0], slack)
            banked_s -= fits[-1][1]
            room_s -= fits[-1][1]
        assert waits.pays

"""Why training runs or yields, as a sentence and as time; targets that cannot be kept."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.config import HarliOptions
from sglang_harli.core import QuantumKind, QuantumOffer, Reason, StepLoad, SubState
from sglang_harli.managers.scheduler.policy import explanation, qos_policy
from sglang_harli.managers.scheduler.policy.explanation import impossible
from sglang_harli.managers.scheduler.policy.serving_state import CHECK_EVERY, ServingState, targets_of
from sglang_harli.managers.scheduler.policy.slo_ledger import PlainProgress
from sglang_harli.managers.scheduler.policy.yield_time import YieldTime
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile.priors import first_guess, from_table
from sglang_harli.predictor.profile.profile_table import DecodePoint, PrefillPoint, ProfileKey, ProfileTable
from sglang_harli.protocol.internal import SetOptions

SERVING = {"decode_ms": 10.04, "decode_upper_ms": 12.5, "slack_ms": 7.5, "slack_bound": "tpot"}
OFFER = QuantumOffer(QuantumKind.BACKWARD, ((1, 1e-4), (2, 2e-4)))


@pytest.mark.parametrize(
    ("sub_state", "reason", "changes", "says"),
    [
        ("training", Reason.IDLE, {}, "Training runs in large quanta: nothing is served."),
        (
            "training",
            Reason.SLACK,
            {},
            "Training runs between decode steps: the next decode step takes 10 ms, at most 12.5, "
            "and the TPOT target leaves 7.5 ms beside it.",
        ),
        (
            "yielding",
            qos_policy.NO_SLACK["ttft"],
            {"slack_ms": -3.25, "slack_bound": "ttft"},
            "Training yields: no slack under the TTFT target; the next decode step takes 10 ms, at most 12.5, "
            "which is 3.25 ms more than the TTFT target leaves.",
        ),
        ("yielding", Reason.PREFILL_WAITING, {}, "Training yields: a prompt waits for prefill."),
        ("yielding", Reason.PAUSED, {"slack_ms": None}, "Training yields: generation is paused."),
        (
            "waiting_data",
            "waiting for the next micro-batch",
            {},
            "Training does not run (waiting data): waiting for the next micro-batch.",
        ),
        (
            "yielding",
            qos_policy.NO_SLACK["tpot"],
            {"impossible_targets": ["tpot-slo-ms=1 cannot be kept here"]},
            "Training yields until nothing is served: tpot-slo-ms=1 cannot be kept here, so training uses idle "
            "time only.",
        ),
    ],
)
def test_the_sentence(sub_state, reason, changes, says):
    assert explanation.why(sub_state, reason, {**SERVING, **changes}) == says


@given(
    sub_state=st.sampled_from([s.value for s in SubState]),
    reason=st.sampled_from([*Reason, ""]),
    slack_ms=st.none() | st.floats(-1e3, 1e3),
    bound=st.sampled_from((None, "none", "tpot", "itl", "ttft")),
)
def test_every_state_has_one_sentence(sub_state, reason, slack_ms, bound):
    text = explanation.why(sub_state, reason, {**SERVING, "slack_ms": slack_ms, "slack_bound": bound})
    assert text.startswith("Training ") and text.endswith(".") and "\n" not in text


def test_yield_time_by_reason():
    yielded, a, b = YieldTime(), Reason.BANKING, Reason.PAUSED
    yielded.hold(a, 1.0)
    yielded.hold(a, 2.0)
    yielded.hold(b, 3.0)
    assert yielded.totals(3.5) == {a: 2.0, b: 0.5}
    yielded.end(4.0)
    yielded.end(9.0)
    assert yielded.totals(10.0) == {a: 2.0, b: 1.0}


# ---------------------------------------------------------------- impossible targets
def learnt(side: ServingState, seconds: float = 0.010, steps: int = CHECK_EVERY) -> ServingState:
    for _ in range(steps):
        side.learn(BatchLoad(True, 1, 300, 1, 300), seconds)
    return side


def test_which_targets_cannot_be_kept():
    targets = targets_of(HarliOptions(tpot_slo_ms=5, ttft_slo_ms=20, max_itl_ms=8))
    assert impossible(targets, decode_s=None, prefill_s=None) == {}
    assert set(impossible(targets, decode_s=0.007, prefill_s=0.01)) == {"tpot"}
    found = impossible(targets, decode_s=0.0091, prefill_s=0.03)
    assert list(found) == ["tpot", "itl", "ttft"]
    assert (
        found["tpot"] == "tpot-slo-ms=5 cannot be kept here: a decode step of one request alone takes 9.1 ms"
    )


def test_an_impossible_target_is_said_once_it_is_measured_and_training_uses_idle_time_only(caplog):
    side = ServingState(HarliOptions(tpot_slo_ms=2))
    side.check_targets()
    assert not side.impossible  # nothing is measured yet, and a guess says nothing
    with caplog.at_level(logging.WARNING):
        learnt(side, steps=3 * CHECK_EVERY)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "tpot-slo-ms=2 cannot be kept here" in said and "idle time only" in said
    assert side.status()["impossible_targets"] == [side.impossible["tpot"]]
    clock = PlainProgress(0.0, 99.0, 100_000)  # so far ahead that it has banked minutes
    slack = side.slack([clock], 300, 99.0, 0.0)
    assert qos_policy.decide(StepLoad(running=1), slack, OFFER, side.targets).quanta == 0
    assert qos_policy.decide(StepLoad(), side.slack([], 0, 99.0, 0.0), OFFER, side.targets).quanta == 1


def test_a_profile_says_it_at_start_up(caplog):
    points = [DecodePoint(b, 100 * b, 0.010 + 0.001 * b) for b in (1, 2, 4)]
    table = ProfileTable(ProfileKey("m", "d", "t", "s", ""), points, [PrefillPoint(64, 4096, 0.05)])
    side = ServingState(HarliOptions(tpot_slo_ms=5, ttft_slo_ms=10_000))
    side.predictor = LatencyPredictor(from_table(table, first_guess()))
    with caplog.at_level(logging.WARNING):
        side.check_targets()
    assert list(side.impossible) == ["tpot"] and len(caplog.records) == 1


def test_set_says_that_a_target_cannot_be_kept_and_a_possible_one_ends_it():
    side = learnt(ServingState(HarliOptions()))
    answer = side.set_options(SetOptions(request=1, values={"tpot_slo_ms": 1.0}))
    assert answer.outcome == "applied" and "cannot be kept" in answer.text
    answer = side.set_options(SetOptions(request=2, values={"tpot_slo_ms": 40.0}))
    assert (answer.outcome, answer.text, side.impossible) == ("applied", "", {})

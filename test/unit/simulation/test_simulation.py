"""The simulator: nothing is lost, deadlines are kept when predictions hold, and no policy beats the
upper limit."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_harli.core import SmSplit, StepLoad
from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import KEPT_S, KEPT_SHARE, RequestProgress
from sglang_harli.simulation import command, compare, engine, policies, temporal, upper_limit
from sglang_harli.simulation.devices import (
    RATE_MODELS,
    Noise,
    Rung,
    SpatialDevice,
    TimeSharedDevice,
    ada_rungs,
    finetune_rate,
)
from sglang_harli.simulation.results import Outcome
from sglang_harli.simulation.traces import Trace, TraceRequest

TARGETS = engine.targets_of(0.040)
RUNGS = ada_rungs()


def rates(model: str = "proportional") -> tuple[float, ...]:
    return tuple(finetune_rate(model, rung.split) for rung in RUNGS)


@st.composite
def short_traces(draw, most: int = 30) -> Trace:
    """Loads that serving alone holds within the target, whatever comes together."""
    rows = draw(
        st.lists(
            st.tuples(st.floats(0, 4), st.integers(1, 900), st.integers(1, 90)), min_size=1, max_size=most
        )
    )
    requests = sorted(
        (TraceRequest(round(at, 3), prompt, output) for at, prompt, output in rows), key=lambda r: r.arrival_s
    )
    return Trace("short", tuple(requests))


class RandomOnTime(policies._Untaught):
    """Any rung and any amount of training that keeps every deadline."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        pace = TARGETS.tpot_s * (1 - KEPT_SHARE)
        room_s = min(clock.first_token_s + clock.emitted * pace - KEPT_S - now_s for clock in running)
        ways = []
        for i, rung in enumerate(RUNGS):
            alone_s = rung.alone_s(load.running, load.context_tokens)
            whole_s = alone_s * rung.stretch
            if whole_s <= room_s:
                ways.append((i, whole_s))
            elif alone_s <= room_s:
                ways.append((i, (room_s - alone_s) / (1 - 1 / rung.stretch)))
        return self._rng.choice(ways) if ways else (0, 0.0)


@given(trace=short_traces(), model=st.sampled_from(RATE_MODELS))
@settings(max_examples=40, deadline=None)
def test_every_request_is_on_time_beside_training_when_predictions_hold(trace, model):
    rig = SpatialDevice()
    ours = engine.run_spatial(
        trace, rig, policies.HarliSpatial(rig, TARGETS, rates(model)), rates(model), TARGETS
    )
    alone = engine.run_spatial(trace, rig, policies.FixedRung(rig, 0), rates(model), TARGETS)
    assert alone.attainment == 1.0
    assert ours.attainment == 1.0
    assert ours.rate >= alone.rate


@given(trace=short_traces(20), quiet=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_quanta_between_steps_turn_nobody_late(trace, quiet):
    rig = TimeSharedDevice(decode_only=True, sizes=tuple(range(1, quiet + 1)))
    ours = engine.run_temporal(trace, rig, policies.HarliTemporal(rig, TARGETS), TARGETS)
    alone = engine.run_temporal(trace, rig, policies.ServeOnly(), TARGETS)
    assert alone.attainment == 1.0
    assert ours.attainment == 1.0


@pytest.mark.parametrize("gap_s", [0.15, 0.3, 0.5])  # 89, 66 and 46% busy
@pytest.mark.parametrize("tpot_s", [0.020, 0.040])
def test_banking_for_larger_quanta_trains_more_and_keeps_the_target(gap_s, tpot_s, monkeypatch):
    rng, requests, at_s = random.Random(1), [], 0.0
    for _ in range(150):
        at_s += rng.expovariate(1 / gap_s)
        requests.append(TraceRequest(at_s, 100, rng.randint(20, 40)))
    trace, rig, targets = (
        Trace("short answers", tuple(requests)),
        TimeSharedDevice(),
        engine.targets_of(tpot_s),
    )

    def run() -> Outcome:
        return engine.run_temporal(trace, rig, policies.HarliTemporal(rig, targets), targets)

    monkeypatch.setattr(policies, "IDLE_SEEN_S", 0.0)
    banking = run()
    monkeypatch.setattr(qos_policy, "WORTH_WAITING", float("inf"))
    greedy = run()
    assert banking.attainment == greedy.attainment == 1.0
    assert banking.rate > 1.02 * greedy.rate


@pytest.mark.parametrize("tpot_s", [0.018, 0.036])
def test_prompts_that_come_in_a_row_turn_nobody_late(tpot_s):
    """Two cores at 72% busy: a prefill takes 25 ms, a step 7 to 10, and now and then several come
    at once."""
    rng, requests, at_s = random.Random(1), [], 0.0
    for _ in range(600):
        at_s += rng.expovariate(5.0)
        requests.append(TraceRequest(at_s, 100, rng.randint(20, 40)))
    trace, targets = Trace("short answers", tuple(requests)), engine.targets_of(tpot_s)
    rig = TimeSharedDevice(
        solo=Rung(SmSplit(1, 0), 6.5e-3, 0.6e-3, 0.5e-6, 1.0),
        prefill_s=10e-3,
        prefill_token_s=150e-6,
        quantum_s=3e-3,
    )
    alone = engine.run_temporal(trace, rig, policies.ServeOnly(), targets)
    ours = engine.run_temporal(trace, rig, policies.HarliTemporal(rig, targets), targets)
    assert alone.attainment == ours.attainment == 1.0
    assert ours.rate > (1 - alone.busy_s / alone.window_s) * rig.best_rate


TO_THE_END = 1000.0  # windows: with few places for requests a trace takes more than a run usually waits for
OVERLOAD = Trace("short", (TraceRequest(0.0, 900, 90),) * 20)


def conserved(outcome: Outcome, trace: Trace) -> None:
    assert outcome.finished == outcome.requests == len(trace.requests)
    assert outcome.tokens == sum(request.output_tokens for request in trace.requests)
    assert 0.0 <= outcome.attainment <= 1.0
    assert outcome.busy_s <= outcome.window_s + 1e-9


@given(
    trace=short_traces(),
    which=st.integers(0, 4),
    decode_only=st.booleans(),
    max_running=st.integers(1, 40),
    sigma=st.sampled_from((0.0, 0.05)),
)
@example(trace=OVERLOAD, which=3, decode_only=False, max_running=1, sigma=0.05)
@settings(max_examples=60, deadline=None)
def test_requests_and_tokens_are_conserved(trace, which, decode_only, max_running, sigma):
    rig = SpatialDevice(decode_only=decode_only, noise=Noise(sigma), max_prefill_tokens=1000)
    margin = 1.1 if sigma else None
    policy = (
        policies.HarliSpatial(rig, TARGETS, rates(), margin),
        policies.OneRungLadder(rig),
        policies.FixedRung(rig, len(RUNGS) - 1),
        policies.BatchThreshold(rig),
        policies.FixedRung(rig, 0),
    )[which]
    with patch.object(engine, "DRAIN", TO_THE_END):
        outcome = engine.run_spatial(trace, rig, policy, rates(), TARGETS, max_running=max_running)
    conserved(outcome, trace)


@given(
    trace=short_traces(), which=st.integers(0, 3), decode_only=st.booleans(), max_running=st.integers(1, 40)
)
@example(trace=OVERLOAD, which=0, decode_only=False, max_running=1)
@example(trace=OVERLOAD, which=1, decode_only=False, max_running=1)
@settings(max_examples=60, deadline=None)
def test_temporal_runs_conserve_too(trace, which, decode_only, max_running):
    rig = TimeSharedDevice(decode_only=decode_only)
    policy = (
        policies.HarliTemporal(rig, TARGETS),
        policies.FixedQuantum(2),
        policies.QuantumBelowBatch(4, 3),
        policies.ServeOnly(),
    )[which]
    with patch.object(engine, "DRAIN", TO_THE_END):
        outcome = engine.run_temporal(trace, rig, policy, TARGETS, max_running=max_running)
    conserved(outcome, trace)
    assert outcome.rate <= rig.best_rate * (1 + 1e-9)
    # Every policy waits while prompts wait: with too few places that may be all the time, and then
    # only.
    always_waiting = max_running < len(trace.requests) and outcome.busy_s >= outcome.window_s - 1e-9
    assert outcome.rate > 0.0 or which == 3 or always_waiting
    assert outcome.rate == 0.0 or which != 3


@given(trace=short_traces(), model=st.sampled_from(RATE_MODELS), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_nobody_who_keeps_the_deadlines_beats_the_upper_limit(trace, model, seed):
    rig = SpatialDevice()
    most = upper_limit.limit(trace, RUNGS, rates(model), TARGETS, period_s=0.5)
    for policy in (policies.HarliSpatial(rig, TARGETS, rates(model)), RandomOnTime(seed)):
        outcome = engine.run_spatial(trace, rig, policy, rates(model), TARGETS)
        assert outcome.rate <= most.rate * (1 + 1e-6), policy.name


@given(trace=short_traces(20), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_upper_limit_holds_under_load_and_for_turns(trace, seed):
    """Long requests that come close together: the load that the limit is about."""
    heavy = Trace(
        "heavy",
        tuple(
            dataclasses.replace(
                request, arrival_s=request.arrival_s / 4, output_tokens=request.output_tokens + 60
            )
            for request in trace.requests
        ),
    )
    rig = SpatialDevice()
    most = upper_limit.limit(heavy, RUNGS, rates(), TARGETS)
    for policy in (policies.HarliSpatial(rig, TARGETS, rates()), RandomOnTime(seed)):
        assert engine.run_spatial(heavy, rig, policy, rates(), TARGETS).rate <= most.rate * (1 + 1e-6)
    turns = TimeSharedDevice(decode_only=True)
    most = upper_limit.limit(heavy, (turns.solo,), (0.0,), TARGETS, gap_rate=turns.best_rate)
    ours = engine.run_temporal(heavy, turns, policies.HarliTemporal(turns, TARGETS), TARGETS)
    assert ours.rate <= most.rate * (1 + 1e-6)


def test_the_limit_says_when_not_even_serving_alone_keeps_the_target():
    crowd = Trace("crowd", tuple(TraceRequest(0.0, 1500, 200) for _ in range(90)))
    assert upper_limit.limit(crowd, RUNGS, rates(), TARGETS).tpot_s > TARGETS.tpot_s * (1 - KEPT_SHARE)


def test_a_run_is_repeated_exactly():
    trace = compare.committed()[1]
    rig = SpatialDevice(noise=Noise(0.05, 0.02, seed=3))

    def once() -> Outcome:
        fresh = compare.again(rig)
        return engine.run_spatial(
            trace, fresh, policies.HarliSpatial(fresh, TARGETS, rates(), 1.1), rates(), TARGETS
        )

    assert once() == once()


def test_under_noise_the_margin_keeps_requests_on_time():
    trace = next(trace for trace in compare.committed() if trace.name == "conv-32")
    rig = SpatialDevice(noise=Noise(0.05, 0.10, seed=3))
    policy = policies.HarliSpatial(rig, TARGETS, rates(), 1.1)
    ours = engine.run_spatial(trace, rig, policy, rates(), TARGETS)
    assert ours.attainment >= 0.99


def test_the_published_card():
    """Decode is flat from 28 SMs up, and the co-run penalty saturates near 1.25 (Harli, latency
    predictor)."""
    flat = [rung.base_s for rung in RUNGS]
    assert max(flat) < 1.11 * min(flat)
    assert all(1.23 < rung.stretch < 1.30 for rung in RUNGS if rung.split.finetune >= 40)
    assert RUNGS[0].split.finetune == 0 and all(
        rung.split.decode + rung.split.finetune <= 142 for rung in RUNGS
    )
    assert finetune_rate("saturating", RUNGS[-1].split) == 56.0
    with pytest.raises(ConfigError, match="proportional, saturating"):
        finetune_rate("linear", RUNGS[-1].split)


def test_a_step_with_a_part_of_training_lies_between():
    rig = SpatialDevice()
    alone, half, whole = (rig.predicted_s(5, 40, 50_000, train_s) for train_s in (0.0, 0.015, 1.0))
    assert alone == RUNGS[5].alone_s(40, 50_000) < half < whole == pytest.approx(RUNGS[5].step_s(40, 50_000))


def outcome(policy: str, rate: float, attainment: float = 1.0) -> Outcome:
    return Outcome(policy, 10, 10, 100, attainment, 0.03, 0.04, 0.05, rate, 10.0, 8.0, 0.1, 20.0)


def row(ours: Outcome, batch: float = 50.0, limit: float = 60.0) -> compare.Row:
    others = [outcome("one-rung ladder", 40.0, 0.99), outcome("batch threshold", 9.0)]
    return compare.Row(
        "t", batch, "proportional", [ours, *others], upper_limit.Limit(limit, 0.0388), simulated_s=1.0
    )


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (row(outcome("harli", 56.0, 0.99)), None),
        (row(outcome("harli", 45.0), limit=46.0), "1.15 is asked"),
        (row(outcome("harli", 45.0), batch=32.0, limit=46.0), None),
        (row(outcome("harli", 39.0), batch=4.0, limit=40.0), "1 is asked"),
        (row(outcome("harli", 56.0, 0.98)), "attainment 0.9800 below"),
        (row(outcome("harli", 53.0)), "0.883 of the upper limit"),
    ],
)
def test_the_judge(given, wrong):
    problems = compare.judge(given)
    assert (wrong is None and not problems) or (len(problems) == 1 and wrong in problems[0])


def test_the_temporal_judge():
    alone, fixed = outcome("serve only", 0.0), outcome("fixed 1 rows", 50.0, 0.5)
    good = compare.Row("t", 4.0, "tokens", [outcome("harli", 40.0), fixed, alone], None, 1.0)
    assert temporal.judge(good) == []
    bad = compare.Row("t", 4.0, "tokens", [outcome("harli", 40.0, 0.9), outcome("x", 41.0), alone], None, 1.0)
    assert len(temporal.judge(bad)) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "both"},
        {"rate": "linear"},
        {"tpot_ms": 0.0},
        {"max_itl_ms": 10.0},
        {"limit": 0},
        {"noise": 1.5},
        {"error": -1.0},
    ],
)
def test_bad_options_are_refused(given):
    with pytest.raises(ConfigError):
        command.simulate(command.SimulationOptions(**given))


def test_the_command_on_a_file(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,500,60\n0.4,900,80\n1.0,20,1\n")
    result = command.simulate(command.SimulationOptions(trace=str(path)))
    assert [found.rate_model for found in result.rows] == list(RATE_MODELS)
    assert result.problems == []
    assert json.loads(json.dumps(result.as_dict()))["rows"][0]["policies"][0]["policy"] == "harli"
    assert any("harli" in line for line in result.lines(brief=True))
    assert any("upper limit" in line for line in result.lines(brief=False))
    prefilled = command.simulate(
        command.SimulationOptions(trace=str(path), prefill=True, rate="proportional")
    )
    assert prefilled.rows[0].oracle is None and list(prefilled.lines(brief=True))
    turns = command.simulate(command.SimulationOptions(trace=str(path), mode="temporal", tpot_ms=30))
    assert turns.problems == [] and list(turns.lines(brief=True))


def test_a_load_far_beyond_the_device_has_no_limit_and_still_runs(tmp_path):
    rows = "".join(f"{i / 20},3000,200\n" for i in range(60))
    (tmp_path / "flood.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    result = command.simulate(command.SimulationOptions(trace=str(tmp_path / "flood.csv"), mode="temporal"))
    assert result.rows[0].oracle is None and result.rows[0].outcomes[0].attainment < 0.5
    assert list(result.lines(brief=False))

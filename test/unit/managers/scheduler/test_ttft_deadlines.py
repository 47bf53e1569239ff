"""TTFT deadlines of prompts that wait: read from SGLang's requests, in the ledger, in the policy,
and in a loop."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.config import HarliOptions
from sglang_harli.core import QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy, waiting_prompts
from sglang_harli.managers.scheduler.policy.serving_state import ServingState, targets_of
from sglang_harli.managers.scheduler.policy.slo_ledger import (
    KEPT_S,
    KEPT_SHARE,
    Backlog,
    PlainProgress,
    Slack,
    backlog_slack,
)
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile.priors import first_guess

OPTIONS = HarliOptions(ttft_slo_ms=200.0)
TARGETS = targets_of(OPTIONS)


def req(
    prompt: int, came_s: float = 0.0, *, emitted: int = 0, cached: int = 0, done: int = 0, most: int = 10
) -> Any:
    """What is read of one of SGLang's requests, of either version."""
    return SimpleNamespace(
        origin_input_ids=[1] * prompt,
        output_ids=[1] * emitted,
        prefix_indices=[0] * cached,
        extend_range=SimpleNamespace(start=done // 2, end=done),
        prefix_len=done // 2 or cached,
        extend_end=done,
        sampling_params=SimpleNamespace(max_new_tokens=most),
        time_stats=SimpleNamespace(scheduler_recv_time=came_s),
    )


def backlog(*waiting: Any, chunked: Any = None, **given: Any) -> Backlog | None:
    return waiting_prompts.backlog_of(LatencyPredictor(), waiting, chunked, **{"chunk_tokens": None, **given})


def test_a_backlog_is_charged_as_a_whole_and_is_as_old_as_its_oldest():
    found = backlog(req(100, 5.0), req(50, 3.0, cached=20))
    assert found is not None and (found.prompts, found.since_s, found.admitted) == (2, 3.0, True)
    assert found.prefill_upper_s == LatencyPredictor().prefill(130, 100 * 100 + 30 * 50).upper_s


def test_what_a_chunked_prefill_has_left():
    left = backlog(chunked=req(100, 1.0, done=60))
    assert left is not None and left.prompts == 1
    assert left.prefill_upper_s == LatencyPredictor().prefill(40, 40 * 100).upper_s
    parts = backlog(req(100), chunk_tokens=40)
    assert parts is not None
    assert parts.prefill_upper_s == 3 * LatencyPredictor().prefill(34, 3334).upper_s


def test_a_prompt_without_a_place_waits_for_the_requests_that_run():
    running = [req(5, emitted=2, most=9), req(5, emitted=2, most=4), req(5, emitted=1, most=50)]
    assert waiting_prompts.batch_seat_waits(running, 2) == [2, 7]
    found = backlog(req(10, 5.0), req(10, 5.5), slots_s=[0.02, 0.7])
    assert found is not None and not found.admitted
    assert found.since_s == pytest.approx(5.5 - 0.7)


@pytest.mark.parametrize(
    "found",
    [
        backlog(*[req(1)] * (waiting_prompts.MOST + 1)),
        backlog(req(10, emitted=3)),  # retracted: it had its first token
        backlog(chunked=req(10, emitted=3)),
        backlog(req(10), req(10), slots_s=[0.1]),
    ],
)
def test_training_stops_where_nothing_is_known(found):
    assert found is None


def test_a_message_may_have_lain_in_the_socket_since_it_was_last_looked_at():
    prompt, unknown = req(10, 5.0), req(10, 5.0)
    waiting_prompts.note_arrivals([prompt], 4.2)
    waiting_prompts.note_arrivals([unknown], 0.0)
    early, late = backlog(prompt), backlog(unknown)
    assert early is not None and late is not None and (early.since_s, late.since_s) == (4.2, 5.0)


def test_slack_before_a_first_token():
    waits = Backlog(2, since_s=10.0, prefill_upper_s=0.05, admitted=True)
    slack = backlog_slack(waits, TARGETS, now_s=10.1, decode_upper_s=0.01, reserve_s=0.03, queued_s=0.02)
    assert slack.bound == "ttft"
    assert slack.seconds == pytest.approx(0.2 * (1 - KEPT_SHARE) - KEPT_S - 0.1 - 0.05 - 0.01 - 0.03 - 0.02)
    none = backlog_slack(waits, targets_of(HarliOptions()), now_s=10.1, decode_upper_s=0.0, reserve_s=0.0)
    assert none.seconds == -math.inf


def test_decode_rounds_before_a_first_token_take_of_its_slack():
    waits = Backlog(2, since_s=10.0, prefill_upper_s=0.05, admitted=False, rounds_s=0.04)
    plain = dataclasses.replace(waits, rounds_s=0.0)
    with_rounds, without = (
        backlog_slack(each, TARGETS, now_s=10.1, decode_upper_s=0.01, reserve_s=0.0)
        for each in (waits, plain)
    )
    assert with_rounds.seconds == pytest.approx(without.seconds - 0.04)


def test_rounds_are_those_before_the_last_prefill_each_as_long_as_the_last():
    rounds = waiting_prompts.DecodeRounds(2, 3, lambda after: 0.01 * after)
    assert rounds.seconds(1) == pytest.approx(2 * 0.02)
    assert rounds.seconds(3) == pytest.approx(8 * 0.08)
    assert rounds.spaced([1, 2, 9]) == [2, 5, 9]
    assert waiting_prompts.NO_ROUNDS.seconds(7) == 0.0
    assert waiting_prompts.NO_ROUNDS.spaced([0, 2, 7]) == [0, 2, 7]
    found = backlog(req(100), chunk_tokens=40, rounds=rounds)
    assert found is not None and (found.rounds_s, found.admitted) == (pytest.approx(8 * 0.08), False)


def test_prompts_that_come_next_are_charged_to_requests_that_run_and_others_are_not():
    side = ServingState(OPTIONS)
    clocks = [PlainProgress(0.0, 1.0, 40)]
    coming, later = (Backlog(1, 0.98, 0.05, admitted) for admitted in (True, False))
    plain, first, held = (side.slack(clocks, 100, 1.0, 0.0, backlog=b) for b in (None, coming, later))
    assert first.seconds <= plain.seconds - 0.05
    assert held.bound == "ttft" and held.seconds > first.seconds - 1.0
    urgent = side.slack(clocks, 100, 1.0, 0.0, backlog=Backlog(1, 0.5, 0.05, True))
    assert urgent.bound == "ttft" and urgent.seconds < 0


def test_the_policy_trains_while_a_promised_prompt_has_time_and_names_it_when_not():
    offer = QuantumOffer(QuantumKind.BACKWARD, ((1, 0.02), (2, 0.04)))
    load = StepLoad(running=0, promised=2)
    assert not load.idle
    assert qos_policy.decide(load, Slack(0.03, "ttft"), offer, TARGETS).rows == 1
    held = qos_policy.decide(load, Slack(0.01, "ttft"), offer, TARGETS)
    assert (held.quanta, held.reason) == (0, qos_policy.NO_SLACK["ttft"])
    stops = qos_policy.decide(StepLoad(waiting=1, promised=2), Slack(9.0, "ttft"), offer, TARGETS)
    assert (stops.quanta, stops.reason) == (0, Reason.PREFILL_WAITING)


# ---------------------------------------------------------------- the loop
CHUNK = 150
GAP_S = 0.16  # between two arrivals, at least: longer than the longest quantum and a prefill together
TOGETHER = 2  # prompts that may hold up a batch between two steps


def serving_side() -> ServingState:
    """A decode step of one request takes 9 ms, a prefill of 300 tokens 24 ms, at most."""
    side = ServingState(OPTIONS)
    side.predictor = LatencyPredictor(first_guess(token_s=3e-6, pair_s=1e-9, layers=8, decode_s=0.004))
    return side


@dataclass
class Loop:
    """SGLang's loop in time that is simulated: prefill first, in chunks; a batch that is full
    admits nobody.

    All takes exactly its predicted upper bound, the most by which predictions hold.
    """

    places: int
    train: bool
    now_s: float = 0.0
    quanta: int = 0
    judge: bool = False
    judged: int = 0
    side: ServingState = field(default_factory=lambda: serving_side())
    waiting: list[Any] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    chunked: Any = None
    full: bool = False

    def __post_init__(self) -> None:
        # The ledger has seen hold-ups as long as what may come together here.
        per_prompt = self.side.predictor.prefill(300, 90_000).upper_s
        self.side.reserve.half_life_s = 1e9
        self.side.reserve.prefill(TOGETHER * per_prompt)
        self.side.reserve.decode(0.0)

    def run(self, requests: list[Any]) -> None:
        self.go_on(list(requests))

    def go_on(self, coming: list[Any]) -> None:
        while coming or self.waiting or self.running or self.chunked:
            while coming and coming[0].time_stats.scheduler_recv_time <= self.now_s:
                self.waiting.append(coming.pop(0))
            if self.chunked or (self.waiting and not self.full and len(self.running) < self.places):
                self._prefill()
                if self.train and (self.chunked or (self.waiting and not self.full)):
                    self._fill(coming, decoded=False)
            elif self.running:
                self.full = bool(self.waiting)
                self._decode()
                if self.train:
                    self._fill(coming, decoded=True)
                before = len(self.running)
                self.running = [r for r in self.running if not r.over]
                self.full = self.full and len(self.running) == before
            elif self.train and coming[0].time_stats.scheduler_recv_time > self.now_s:
                self.now_s += TARGETS.idle_quantum_s
            else:
                self.now_s = max(self.now_s, coming[0].time_stats.scheduler_recv_time)

    def _prefill(self) -> None:
        one = self.chunked or self.waiting.pop(0)
        total, done = len(one.origin_input_ids), one.extend_range.end
        new = min(total - done, CHUNK)
        one.extend_range = SimpleNamespace(start=done, end=done + new)
        one.prefix_len, one.extend_end = done, done + new
        self.now_s += self.side.predictor.prefill(new, new * total).upper_s
        self.chunked = one if done + new < total else None
        if self.chunked is None:
            one.output_ids.append(1)
            one.first_s = one.last_s = self.now_s
            self.running.append(one)
            self.full = len(self.running) >= self.places

    def _decode(self) -> None:
        context = sum(len(r.origin_input_ids) + len(r.output_ids) for r in self.running)
        self.now_s += self.side.predictor.decode(len(self.running), context).upper_s
        for one in self.running:
            one.output_ids.append(1)
            one.last_s = self.now_s
            one.over = len(one.output_ids) >= one.stops

    def _fill(self, coming: list[Any], *, decoded: bool) -> None:
        going = [r for r in self.running if not r.over]
        context = sum(len(r.origin_input_ids) + len(r.output_ids) for r in going)
        waits: Backlog | None = None
        if self.waiting or self.chunked:
            slots_s = None
            if decoded:
                if not self.full or len(going) < len(self.running):
                    return
                steps = waiting_prompts.batch_seat_waits(going, len(self.waiting))
                last = (steps or [0])[-1]
                step_s = self.side.predictor.decode(len(going), context + last * len(going)).upper_s
                slots_s = [count * step_s for count in steps]
            waits = waiting_prompts.backlog_of(
                self.side.predictor, self.waiting, self.chunked, chunk_tokens=CHUNK, slots_s=slots_s
            )
            if waits is None:
                return
        clocks = [PlainProgress(r.first_s, r.last_s, len(r.output_ids)) for r in going]
        offer = QuantumOffer(QuantumKind.BACKWARD, ((1, 0.012), (2, 0.020), (4, 0.036), (8, 0.07)))
        while going or waits:
            arrived = bool(coming) and coming[0].time_stats.scheduler_recv_time <= self.now_s
            load = StepLoad(len(going), context, arrived, waits.prompts if waits else 0)
            slack = self.side.slack(clocks, context, self.now_s, 0.0, backlog=waits)
            decision = qos_policy.decide(load, slack, offer, TARGETS)
            if not decision.quanta:
                return
            if waits and self.judge:
                self._judge(coming, dict(offer.candidates)[decision.rows])
            self.now_s += dict(offer.candidates)[decision.rows]
            self.quanta += 1

    def _judge(self, coming: list[Any], quantum_s: float) -> None:
        """Who waits now, and would be on time if no training ran any more, is so after this quantum
        too."""
        on_time = []
        for delay_s in (0.0, quantum_s):
            twin, later = copy.deepcopy((dataclasses.replace(self, side=self.side), coming))
            twin.train, twin.now_s = False, self.now_s + delay_s
            whose = [*twin.waiting, *([twin.chunked] if twin.chunked else [])]
            twin.go_on(later)
            on_time.append([met(one)[0] for one in whose])
        self.judged += 1
        assert all(after or not before for before, after in zip(*on_time, strict=True))


def met(one: Any) -> tuple[bool, bool]:
    """Whether it met the TTFT and the TPOT target."""
    ttft_s = one.first_s - one.time_stats.scheduler_recv_time
    return ttft_s <= TARGETS.ttft_s, one.last_s - one.first_s <= (len(one.output_ids) - 1) * TARGETS.tpot_s


def crowd(seed: int, mean_s: float, longest: int) -> list[Any]:
    rng = random.Random(seed)
    made, at = [], 0.0
    for _ in range(25):
        at += GAP_S + rng.expovariate(1 / mean_s)
        one = req(rng.randint(20, 300), at, most=(most := rng.randint(2, longest)))
        one.stops, one.over = rng.randint(2, most), False  # it may end before its limit
        made.append(one)
    return made


MEANS_S = st.sampled_from((0.05, 0.15, 0.4, 1.0))
LONGEST = st.sampled_from((4, 15, 40))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), mean_s=MEANS_S, longest=LONGEST)
def test_no_decision_turns_an_on_time_request_late_when_predictions_hold(seed, mean_s, longest):
    """Who has a first token, and tokens after it, on time from serving alone has them on time
    beside training."""
    alone, beside = crowd(seed, mean_s, longest), crowd(seed, mean_s, longest)
    Loop(32, train=False).run(alone)
    Loop(32, train=True).run(beside)
    for before, after in zip(alone, beside, strict=True):
        for was, is_now in zip(met(before), met(after), strict=True):
            assert is_now or not was


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), mean_s=MEANS_S, longest=LONGEST, places=st.sampled_from((1, 2, 3)))
def test_no_decision_turns_a_prompt_that_waits_late(seed, mean_s, longest, places):
    """Where places are short too.  What nobody can know beforehand is who will come; hence judged
    from then on."""
    Loop(places, train=True, judge=True).run(crowd(seed, mean_s, longest))


def test_prompts_that_have_time_do_not_stop_training():
    judged = 0
    for places in (1, 2, 3):
        trained = Loop(places, train=True, judge=True)
        trained.run(crowd(3, 0.15, 15))
        judged += trained.judged
    assert judged > 0

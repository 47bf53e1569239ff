"""The loop between two steps of serving, in time of its own: what it offers, holds back, cuts,
doubts and asks again."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from sglang_harli.core import Claim, Decision, QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack, Targets
from sglang_harli.managers.scheduler.policy.slotting import (
    DOUBTED_AFTER,
    EVERY_STEP_S,
    PATIENCE,
    PROBE_EVERY_S,
    PROBE_SHARE,
    SHARE,
    Slotting,
)
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile.priors import first_guess

TARGETS = Targets(tpot_s=0.05, ttft_s=None, max_itl_s=None, busy_quantum_s=0.1, idle_quantum_s=0.25)
KIND = QuantumKind.BACKWARD


@dataclass
class Quanta:
    """Training whose quanta take what they are said to (``slotting.Training``)."""

    sizes: tuple[tuple[int, float], ...] = ((1, 0.01), (2, 0.02), (4, 0.04))
    cuts: int = 0
    barred: Reason | None = None
    queued_s: float = 0.0
    expected_queued_s: float = 0.0
    depth: int = 1
    saving: bool = False
    now_s: float = 0.0
    ran: list[int] = field(default_factory=list)
    doubt: float = 1.0
    doubted: int = 0
    shown: list[Reason] = field(default_factory=list)
    claims: list[tuple[Claim, float]] = field(default_factory=list)  # and what each takes

    def clock(self) -> float:
        return self.now_s

    def offer(self) -> QuantumOffer | None:
        return None if self.barred else QuantumOffer(KIND, self.sizes, doubt=self.doubt)

    def claimed(self) -> QuantumOffer | None:
        if not self.claims:
            return None
        claim, seconds = self.claims[0]
        return QuantumOffer(QuantumKind.COPY, ((1, seconds),), claim=claim)

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None:
        if decision.reason is Reason.CLAIM:
            self.claims.pop(0)
        else:
            self.ran.append(decision.rows)
        self.now_s += dict(offer.candidates)[decision.rows]

    def settle(self, most_s: float | None = None) -> None: ...

    def cut(self, kind: QuantumKind) -> bool:
        if not self.cuts:
            return False
        self.cuts -= 1
        self.sizes = tuple((rows, seconds / 2) for rows, seconds in self.sizes)
        return True

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        self.doubted += 1

    def yields(self, reason: Reason) -> None:
        self.shown.append(reason)


@dataclass
class Served:
    """Requests that decode, with so much slack (``slotting.Serving``)."""

    slack_s: float = 0.0
    bound: str = "tpot"
    running: int = 1
    waiting: int = 0
    later_quantum_s: float = float("-inf")
    idle_comes: bool = False
    slack_gain_s: float = 0.0
    targets: Targets = TARGETS

    def load(self) -> StepLoad:
        return StepLoad(running=self.running, waiting=self.waiting)

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        return Slack(
            self.slack_s,
            self.bound,
            self.later_quantum_s,
            idle_comes=self.idle_comes,
            slack_gain_s=self.slack_gain_s,
        )


@dataclass
class Took:
    at_s: float
    rows: int
    price_s: float
    seconds: float


class Predicted(Quanta):
    """Quanta of blocks of 64 tokens, priced by the real predictor, that take ``truth`` times its
    first guess."""

    def __init__(self, predictor: LatencyPredictor, truth: float) -> None:
        super().__init__()
        self.predictor, self.took = predictor, []
        self.true_s = {
            rows: truth * predictor.quantum(KIND, 64 * rows, 64).expected_s for rows in (1, 2, 4, 8, 16)
        }
        self.took: list[Took] = []

    def offer(self) -> QuantumOffer:
        return QuantumOffer(
            KIND, self.predictor.prices(KIND, self.true_s, 64), doubt=self.predictor.doubt(KIND)
        )

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None:
        rows = decision.rows
        self.took.append(Took(self.now_s, rows, dict(offer.candidates)[rows], self.true_s[rows]))
        self.now_s += self.true_s[rows]
        self.predictor.observe_quantum(KIND, 64 * rows, 64, self.true_s[rows])

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        self.predictor.relax(kind, now_s)


def test_what_runs_between_two_tokens_stays_under_the_bound_of_one_quantum():
    quanta = Quanta()
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=9.0, slack_gain_s=0.01)
    assert slotting.decoded(finished=False)
    slotting.fill(served)
    assert quanta.ran == [4, 4, 2] and quanta.now_s == pytest.approx(TARGETS.busy_quantum_s)
    quanta.now_s += 0.02  # a prefill: the token after the last one is still to come
    slotting.fill(served)
    assert quanta.ran == [4, 4, 2]
    assert slotting.decoded(finished=False)
    slotting.fill(served)
    assert len(quanta.ran) == 6


def test_a_prompt_that_comes_meanwhile_stops_it():
    quanta, served = Quanta(), Served(slack_s=9.0)
    served.waiting = 1
    Slotting(quanta, quanta.clock).fill(served)
    assert quanta.ran == [] and quanta.shown == [Reason.PREFILL_WAITING]


def test_nothing_runs_before_the_loop_has_seen_that_the_last_request_has_finished():
    quanta = Quanta()
    slotting = Slotting(quanta, quanta.clock)
    slotting.fill(Served(slack_s=float("inf"), bound="none", running=0))
    assert quanta.ran == []
    assert slotting.fill_idle(StepLoad, TARGETS, 0.01) and quanta.ran == [4]


def test_idle_time_is_filled_until_the_turn_is_over():
    quanta = Quanta()
    slotting = Slotting(quanta, quanta.clock)
    assert slotting.fill_idle(StepLoad, TARGETS, 0.1)
    assert quanta.ran == [4, 4, 4]
    assert not slotting.fill_idle(lambda: StepLoad(waiting=1), TARGETS, 9.0)
    assert not slotting.fill_idle(StepLoad, TARGETS, 0.1)
    assert quanta.ran == [4, 4, 4]


def test_a_quantum_that_is_too_long_for_now_is_cut_before_its_estimate_is_doubted():
    quanta = Quanta(sizes=((1, 0.3),), cuts=1)
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=9.0)
    slotting.fill(served)  # 0.15 s is too long still
    assert (quanta.cuts, quanta.doubted, quanta.shown) == (0, 1, [Reason.TOO_LONG])
    quanta.cuts = 1
    slotting.fill(served)
    assert quanta.ran == [1]


def test_what_does_not_fit_is_cut_after_some_patience_and_then_doubted():
    quanta, served = Quanta(sizes=((1, 0.02),)), Served(slack_s=0.01)
    slotting = Slotting(quanta, quanta.clock)
    for refusal in range(1, DOUBTED_AFTER + 3):
        quanta.cuts = 0 if refusal != PATIENCE else 1
        slotting.fill(served)
        assert quanta.doubted == max(refusal - DOUBTED_AFTER, 0)
        assert quanta.cuts == (refusal == PATIENCE), "not yet"
    quanta.cuts = 1
    slotting.fill(served)
    assert quanta.ran and not quanta.cuts
    slotting.fill(Served(slack_s=0.001))
    assert quanta.doubted == 2, "it begins anew after a quantum"


@pytest.mark.parametrize(
    "served", [Served(slack_s=0.01, later_quantum_s=0.05), Served(slack_s=-1.0, idle_comes=True)]
)
def test_who_waits_for_more_is_offered_no_less(served):
    quanta = Quanta(sizes=((1, 0.01), (4, 0.03)), cuts=99)
    slotting = Slotting(quanta, quanta.clock)
    slotting.fill_idle(StepLoad, TARGETS, 1.0)  # so much was done that waiting once costs little
    quanta.ran.clear()
    for _ in range(3 * DOUBTED_AFTER):
        slotting.fill(served)
    assert (quanta.ran, quanta.cuts, quanta.doubted) == ([], 99, 0)
    assert set(quanta.shown) == {Reason.BANKING if served.later_quantum_s > 0 else Reason.NO_SLACK_TPOT}


@pytest.mark.parametrize(
    ("doubt", "served", "runs"),
    [
        (0.09, Served(slack_s=0.01), True),
        (0.11, Served(slack_s=0.01), False),  # not enough yet
        (1.0, Served(slack_s=0.2), False),
        (0.09, Served(slack_s=-0.01), False),  # nobody's estimate is to blame
        (0.09, Served(slack_s=0.01, waiting=1), False),
        (0.09, Served(slack_s=0.01, idle_comes=True), False),  # it is measured in idle time
        (0.5, Served(slack_s=0.2), True),  # longer than --harli-max-quantum-ms
    ],
)
def test_the_least_quantum_alone_is_tried_where_its_estimate_is_doubted(doubt, served, runs):
    quanta = Quanta(sizes=((1, 0.11), (2, 0.22), (4, 0.44)), doubt=doubt)
    slotting = Slotting(quanta, quanta.clock)
    slotting.fill(served)
    assert quanta.ran == [1] * runs and slotting.probes == runs


def test_probes_are_rare_and_rarer_where_they_take_long():
    quanta, served = Quanta(sizes=((1, 0.11), (2, 0.22)), doubt=1e-9), Served(slack_s=0.001)
    slotting = Slotting(quanta, quanta.clock)
    began: list[float] = []
    while quanta.now_s < 150.0:
        ran = len(quanta.ran)
        slotting.decoded(finished=True)
        slotting.fill(served)
        if len(quanta.ran) > ran:
            began.append(quanta.now_s)
            quanta.sizes = ((1, 0.11 * 2 ** len(began)), (2, 1.0))
        quanta.now_s += 0.01
    took = [0.11 * 2**n for n in range(len(began))]
    for n in range(1, len(began)):
        assert began[n] - began[n - 1] >= max(PROBE_EVERY_S, took[n - 1] / PROBE_SHARE)
    assert set(quanta.ran) == {1} and slotting.probes == len(began) == 4
    assert [took[n] / PROBE_SHARE <= began[n + 1] - began[n] < took[n] / PROBE_SHARE + 2.0 for n in range(3)]


@pytest.mark.parametrize("truth", [0.002, 0.02, 1.0])
def test_a_guess_that_is_too_high_is_found_out_by_one_small_quantum(truth):
    """Requests run all the time with 4 ms of slack; a block of 64 tokens is guessed to take
    seconds, and takes ``truth`` times that.  What is not a probe fits by its bound, and probes take
    no more than their share."""
    predictor = LatencyPredictor(first_guess(token_s=5e-3))
    quanta = Predicted(predictor, truth)
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=0.004)
    guess_s = predictor.quantum(KIND, 64, 64).expected_s
    assert guess_s > 1.0
    while quanta.now_s < 600.0:
        slotting.decoded(finished=True)
        slotting.fill(served)
        quanta.now_s += 0.01
    probes = [entry for entry in quanta.took if entry.price_s > served.slack_s]
    assert all(entry.rows == 1 for entry in probes) and len(probes) == slotting.probes
    assert 0.0 < probes[0].at_s < 15.0, "a guess is found out soon"
    spans = [later.at_s - one.at_s for one, later in pairwise(probes)]
    assert all(span >= PROBE_EVERY_S for span in spans)
    assert sum(entry.seconds for entry in probes[:-1]) <= 0.0101 * 600.0
    fits = truth == 0.002
    assert (len(quanta.took) > 10_000) if fits else (len(quanta.took) == len(probes))


def test_what_fits_is_taken_where_waiting_has_brought_nothing():
    quanta, served = Quanta(sizes=((1, 0.01), (4, 0.03))), Served(slack_s=0.01, later_quantum_s=0.05)
    slotting = Slotting(quanta, quanta.clock)
    slotting.fill(served)
    assert set(quanta.ran) == {1} and Reason.BANKING not in quanta.shown


def test_an_adapter_that_requests_wait_for_is_loaded_behind_every_step():
    """Whatever waits, and where no decision is due; a step is longer by one slice at least, and by
    little more."""
    for seconds, per_step in ((0.0005, 4), (0.005, 1)):
        quanta = Quanta(claims=[(Claim.EVERY_STEP, seconds)] * 40)
        slotting, busy = Slotting(quanta, quanta.clock), Served(slack_s=-1.0, waiting=3)
        steps = 0
        while quanta.claims:
            left, before_s = len(quanta.claims), quanta.now_s
            if steps % 3:
                slotting.decoded(finished=False)
                slotting.fill(busy)
            else:
                slotting.prefilled()
            assert len(quanta.claims) == left - per_step
            assert quanta.now_s - before_s < EVERY_STEP_S + seconds
            quanta.now_s += 0.01
            steps += 1
        assert steps == 40 / per_step and quanta.ran == []


def test_copies_have_a_share_of_the_time_whatever_waits():
    quanta = Quanta(claims=[(Claim.SHARE, 0.004)] * 60)
    slotting, busy = Slotting(quanta, quanta.clock), Served(slack_s=-1.0, waiting=3)
    while quanta.claims:
        slotting.decoded(finished=False)
        slotting.fill(busy)
        quanta.now_s += 0.01
    assert 0.8 * SHARE < 60 * 0.004 / quanta.now_s <= SHARE * 61 / 60


def test_what_a_claim_takes_is_of_the_gap_between_two_tokens():
    quanta = Quanta(sizes=((1, 0.06),), claims=[(Claim.EVERY_STEP, 0.05)])
    slotting = Slotting(quanta, quanta.clock)
    slotting.decoded(finished=False)
    slotting.fill(Served(slack_s=9.0))
    assert quanta.claims == [] and quanta.ran == []


def test_while_generation_is_paused_claims_alone_run_until_the_turn_is_over():
    quanta = Quanta(claims=[(Claim.SHARE, 0.004)] * 8)
    slotting = Slotting(quanta, quanta.clock)
    slotting.run_claimed(0.02)
    assert len(quanta.claims) == 3
    slotting.run_claimed(quanta.now_s + 1.0)
    assert quanta.claims == [] and quanta.ran == []


def test_after_a_refusal_steps_pass_unasked_and_count_as_refusals():
    quanta = Quanta()
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=-0.03, slack_gain_s=0.005)
    slotting.fill(served)
    asked = []
    for step in range(40):
        if slotting.decoded(finished=step == 22):
            asked.append(step)
            slotting.fill(served)
    assert asked == [4, 9, 14, 19, 22, 27, 32, 37]
    served.slack_s = 0.001  # now it is the estimate that holds it back
    slotting.fill(served)
    assert quanta.doubted == 1, "the steps that nobody asked count"


def test_where_the_gap_is_full_and_not_the_slack_the_next_step_is_asked():
    quanta = Quanta()
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=9.0)
    slotting.decoded(finished=False)
    slotting.fill(served)
    quanta.now_s += 0.02
    slotting.fill(served)  # behind a prefill: nothing has room in the gap
    assert slotting.decoded(finished=False)


def test_the_time_in_which_it_waits_counts_by_reason():
    quanta, served = Quanta(), Served(slack_s=0.0)
    slotting = Slotting(quanta, quanta.clock)
    slotting.fill(served)
    quanta.now_s = 3.0
    quanta.barred = Reason.PAUSED
    slotting.fill(served)
    quanta.now_s = 5.0
    assert slotting.next_idle(StepLoad, TARGETS) is None
    quanta.now_s, quanta.barred = 6.0, None
    assert slotting.next_idle(StepLoad, TARGETS) is not None
    assert slotting.yielded.totals(9.0) == {qos_policy.NO_SLACK["tpot"]: 3.0, Reason.PAUSED: 3.0}
    assert quanta.shown == [Reason.NO_SLACK_TPOT, Reason.PAUSED, Reason.PAUSED]

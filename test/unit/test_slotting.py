"""The loop between two steps of serving, in time of its own: what it offers, holds back, cuts, doubts and asks again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sglang_harli.core import Decision, QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers import qos_policy
from sglang_harli.managers.slo_ledger import Slack, Targets
from sglang_harli.managers.slotting import DOUBTED_AFTER, PATIENCE, Slotting

TARGETS = Targets(tpot_s=0.05, ttft_s=None, max_itl_s=None, busy_quantum_s=0.1, idle_quantum_s=0.25)
KIND = QuantumKind.BACKWARD


@dataclass
class Quanta:
    """Training whose quanta take what they are said to (``slotting.Training``)."""

    sizes: tuple[tuple[int, float], ...] = ((1, 0.01), (2, 0.02), (4, 0.04))
    cuts: int = 0
    barred: Reason | None = None
    queued_s: float = 0.0
    saving: bool = False
    now_s: float = 0.0
    ran: list[int] = field(default_factory=list)
    doubted: int = 0
    shown: list[Reason] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def offer(self) -> QuantumOffer | None:
        return None if self.barred else QuantumOffer(KIND, self.sizes)

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None:
        self.ran.append(decision.rows)
        self.now_s += dict(offer.candidates)[decision.rows]

    def settle(self) -> None: ...

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
    later_s: float = float("-inf")
    idle_comes: bool = False
    gain_s: float = 0.0
    targets: Targets = TARGETS

    def load(self) -> StepLoad:
        return StepLoad(running=self.running, waiting=self.waiting)

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        return Slack(self.slack_s, self.bound, self.later_s, idle_comes=self.idle_comes, gain_s=self.gain_s)


def test_what_runs_between_two_tokens_stays_under_the_bound_of_one_quantum():
    quanta = Quanta()
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=9.0, gain_s=0.01)
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


def test_one_quantum_after_the_last_request_has_finished_and_the_loop_goes_on():
    quanta = Quanta()
    Slotting(quanta, quanta.clock).fill(Served(slack_s=float("inf"), bound="none", running=0))
    assert quanta.ran == [4]


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
    "served", [Served(slack_s=0.01, later_s=0.05), Served(slack_s=-1.0, idle_comes=True)]
)
def test_who_waits_for_more_is_offered_no_less(served):
    quanta = Quanta(sizes=((1, 0.01), (4, 0.03)), cuts=99)
    slotting = Slotting(quanta, quanta.clock)
    for _ in range(3 * DOUBTED_AFTER):
        slotting.fill(served)
    assert (quanta.ran, quanta.cuts, quanta.doubted) == ([], 99, 0)
    assert set(quanta.shown) == {Reason.BANKING if served.later_s > 0 else Reason.NO_SLACK_TPOT}


def test_after_a_refusal_steps_pass_unasked_and_count_as_refusals():
    quanta = Quanta()
    slotting, served = Slotting(quanta, quanta.clock), Served(slack_s=-0.03, gain_s=0.005)
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

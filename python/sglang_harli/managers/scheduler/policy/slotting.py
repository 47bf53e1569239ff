"""The loop between two steps of serving: offers, the policy's answers, and when it is asked again.

Plain Python with the clock as an argument: the scheduler drives it beside SGLang, the simulator and
the tests in time of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sglang_harli.core import Claim, Decision, QuantumKind, QuantumOffer, Reason, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import UNBOUNDED, Slack, Targets
from sglang_harli.managers.scheduler.policy.waiting_pays import WaitingPays
from sglang_harli.managers.scheduler.policy.yield_time import YieldTime

PATIENCE = 8  # refusals in a row after which a quantum is taken in smaller pieces than it would be
DOUBTED_AFTER = 20  # refusals in a row after which the estimate is doubted
# A probe runs although its estimate says that it does not fit. At a TPOT target of 50 ms a request
# gets 200 tokens in this time: one probe of the default --harli-max-quantum-ms, 100 ms, costs each
# 1% of the target; after a longer one the next waits until it costs no more.
PROBE_EVERY_S = 10.0
PROBE_SHARE = 0.01
# An adapter that requests wait for is loaded in slices behind each step of serving: one in any
# case, more within this time. Copies and other adapters get this share of the time besides.
EVERY_STEP_S = 0.002
SHARE = 0.02


class Serving(Protocol):
    """What is served, at one boundary between two of its steps."""

    @property
    def targets(self) -> Targets: ...
    @property
    def running(self) -> int:
        """Requests that go on decoding."""
        ...

    def load(self) -> StepLoad:
        """Asked before each decision, so that a prompt which has just come is seen."""
        ...

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        """See ``ServingState.slack``."""
        ...


class Training(Protocol):
    """What trains."""

    @property
    def queued_s(self) -> float:
        """Upper bound of the training that is launched and not finished, seconds."""
        ...

    @property
    def expected_queued_s(self) -> float:
        """What is expected of it."""
        ...

    @property
    def depth(self) -> int:
        """Quanta that are launched before the first is over, while nothing is served; 1: a quantum
        is over when it returns."""
        ...

    @property
    def saving(self) -> bool:
        """Whether a snapshot is being written on the cores that serving computes on."""
        ...

    @property
    def barred(self) -> Reason | None:
        """Why no quantum is offered although there is work, if not by the policy."""
        ...

    def offer(self) -> QuantumOffer | None:
        """The next quantum and its prices, or None where there is nothing to do now."""
        ...

    def claimed(self) -> QuantumOffer | None:
        """What may run whatever waits (``Claim``), or None."""
        ...

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None: ...
    def settle(self, most_s: float | None = None) -> None:
        """Let the device catch up until another quantum may be launched; ``most_s``: and at most so
        much is queued, by its upper bound."""
        ...

    def cut(self, kind: QuantumKind) -> bool:
        """Offer less of ``kind`` from now on; False: it is as small as it can be."""
        ...

    def relax(self, kind: QuantumKind, now_s: float) -> None:
        """The estimate of ``kind`` alone holds training back: doubt it."""
        ...

    def yields(self, reason: Reason) -> None:
        """Show why it does not run."""
        ...


class Slotting:
    """Decides quanta between two steps of serving, and while nothing is served.

    A request may have banked seconds (a job that begins under a long answer): what is spent between
    two tokens stays under the bound of one quantum all the same, so that no gap is felt as a stall.

    Args:
        clock: seconds, monotonic; that of the requests' times.

    Attributes:
        yielded: how long training had work and did not run, by reason.
        probes: quanta that ran to be measured, although their estimates did not fit.
    """

    def __init__(self, training: Training, clock: Callable[[], float] = time.perf_counter) -> None:
        self.yielded = YieldTime()
        self._training, self._clock = training, clock
        self._held_back = 0  # refusals in a row that smaller pieces or another estimate may undo
        self._skipped = self._skip = 0  # decode steps without a decision since the last one, and for how many
        self._gap_s = 0.0  # spent on training since the latest decode step
        self._waiting = WaitingPays()
        self.probes = 0
        self._share_from_s = self._probe_from_s = -math.inf  # no claim of a share, no probe before that
        self._probed_s: float | None = None  # when the one began that has just run
        # Of the boundary at hand: its begin, time spent and steps skipped before, if a quantum ran.
        self._begin_s = self._spent_s = 0.0
        self._unasked = 0
        self._ran = False

    # ---------------------------------------------------------------- beside requests
    def decoded(self, *, finished: bool) -> bool:
        """After a decode step, in which requests ``finished`` or not; whether a decision is due."""
        self._gap_s = 0.0
        self._run_claims()
        if not finished and self._skipped < self._skip:
            self._skipped += 1
            return False
        return True

    def prefilled(self) -> None:
        """A prefill is over."""
        self._waiting.prefilled()
        self._run_claims()

    def _run_claims(self) -> None:
        """What may run behind a step of serving whatever waits."""
        begin_s = now_s = self._clock()
        while (offer := self._training.claimed()) is not None:
            every_step = offer.claim is Claim.EVERY_STEP
            if now_s - begin_s >= EVERY_STEP_S if every_step else now_s < self._share_from_s:
                break
            self._run_claim(offer)
            took_s, now_s = self._clock() - now_s, self._clock()
            if not every_step:
                took_s += self._training.queued_s  # on a device it is queued still
                self._share_from_s = now_s + took_s / SHARE - took_s
        self._gap_s += now_s - begin_s

    def run_claimed(self, until_s: float) -> None:
        """No step of serving is begun (generation is paused): what has a claim runs, until then."""
        while self._clock() < until_s and (offer := self._training.claimed()) is not None:
            self._run_claim(offer)
            self._training.settle()

    def _run_claim(self, offer: QuantumOffer) -> None:
        self._training.run_quantum(offer, Decision(1, offer.candidates[0][0], Reason.CLAIM))

    def fill(self, serving: Serving) -> None:
        """Quanta until the next step of serving is to begin, one decision each."""
        self.begin(serving)
        while (chosen := self.next(serving)) is not None:
            self._training.run_quantum(*chosen)

    def begin(self, serving: Serving) -> None:
        """A boundary between two steps begins."""
        self._begin_s = self._clock()
        self._spent_s = self._gap_s if serving.running else 0.0
        self._ran = False
        self._unasked, self._skipped, self._skip = self._skipped, 0, 0
        self._waiting.begin()

    def next(self, serving: Serving) -> tuple[QuantumOffer, Decision] | None:
        """The quantum to run now, or None: the next step of serving is to begin.

        None too behind the last request: until its next turn SGLang counts it as running, and would
        refuse what asks for an idle server (``/flush_cache``) for the whole quantum.
        """
        self._count_probe()
        targets = serving.targets
        while not (load := serving.load()).idle and (offer := self._offer()) is not None:
            now_s, queued_s = self._clock(), self._training.queued_s
            self._gap_s = self._spent_s + now_s - self._begin_s
            found = serving.slack(now_s, queued_s, disturbed=self._training.saving)
            room_s = targets.busy_quantum_s - self._gap_s - self._training.expected_queued_s
            if not load.waiting:
                self._waiting.could(offer, found, room_s, now_s)
                if not self._waiting.pays:
                    found = replace(found, later_quantum_s=-math.inf, idle_comes=False)
            slack = replace(found, seconds=min(found.seconds, room_s))
            decision = qos_policy.decide(load, slack, offer, targets)
            if decision.quanta:
                self._waiting.ran(offer, decision.rows, found)
                return self._chosen(offer, decision, now_s)
            if (probe := self._probe(decision, slack, offer, targets, now_s)) is not None:
                return self._chosen(offer, probe, now_s)
            shown = not self._ran or decision.reason is Reason.TOO_LONG
            if shown and self._hold_back(offer, decision, slack, now_s):
                continue
            self.yielded.hold(decision.reason, now_s)
            self._skip = 0 if self._ran else qos_policy.ask_again_after(decision, found)
            return None
        return None

    # ---------------------------------------------------------------- while nothing is served
    def fill_idle(
        self, load: Callable[[], StepLoad], targets: Targets, until_s: float, *, one: bool = False
    ) -> bool:
        """Quanta back to back until a prompt comes, or the time is over; whether one ran.  ``one``:
        not more than that."""
        ran = False
        while self._clock() < until_s and (chosen := self.next_idle(load, targets)) is not None:
            self._training.run_quantum(*chosen)
            self._training.settle()
            ran = True
            if one:
                break
        return ran

    def next_idle(
        self, load: Callable[[], StepLoad], targets: Targets
    ) -> tuple[QuantumOffer, Decision] | None:
        """The quantum to run now, or None."""
        self._skip = 0
        offer = self._offer()
        if offer is None:
            return None
        if self._training.depth > 1:
            targets = self._beside_queued(offer, targets)
        decision, now_s = qos_policy.decide(load(), UNBOUNDED, offer, targets), self._clock()
        if decision.quanta:
            self._waiting.ran_idle(offer, decision.rows, now_s)
            return self._chosen(offer, decision, now_s)
        self.yielded.hold(decision.reason, now_s)
        return None

    def _beside_queued(self, offer: QuantumOffer, targets: Targets) -> Targets:
        """The targets with the idle bound that is left beside what is queued.

        A prompt waits for all of that, so it is the sum that keeps the bound: two quanta of half
        of it, or where the least is larger, what the one before leaves, once it is over if need
        be.
        """
        bound_s, least_s = targets.idle_quantum_s, offer.candidates[0][1]
        each_s = bound_s / self._training.depth
        if least_s > each_s:
            self._training.settle(max(bound_s - least_s, 0.0))
            each_s = bound_s - self._training.queued_s
        else:
            self._training.settle(bound_s - each_s)
        return replace(targets, idle_quantum_s=each_s)

    # ---------------------------------------------------------------- both
    def _offer(self) -> QuantumOffer | None:
        offer = self._training.offer()
        if offer is None:
            if (barred := self._training.barred) is None:
                self.yielded.end(self._clock())
            else:
                self.yielded.hold(barred, self._clock())
                self._training.yields(barred)
        return offer

    def _chosen(self, offer: QuantumOffer, decision: Decision, now_s: float) -> tuple[QuantumOffer, Decision]:
        self.yielded.end(now_s)
        self._held_back, self._ran = 0, True
        return offer, decision

    def _probe(
        self, decision: Decision, slack: Slack, offer: QuantumOffer, targets: Targets, now_s: float
    ) -> Decision | None:
        """The least quantum where its estimate alone has held training back (``PROBE_EVERY_S``)."""
        if offer.doubt >= 1.0 or self._ran or now_s < self._probe_from_s:
            return None
        probe = qos_policy.probe(decision, slack, offer, targets)
        if probe is not None:
            self.probes += 1
            self._probed_s = now_s
        return probe

    def _count_probe(self) -> None:
        """How long a probe took says when the next one may run; on a device it is queued still."""
        if self._probed_s is not None:
            now_s = self._clock()
            took_s = now_s - self._probed_s + self._training.queued_s
            self._probe_from_s, self._probed_s = now_s + max(PROBE_EVERY_S, took_s / PROBE_SHARE), None

    def _hold_back(self, offer: QuantumOffer, decision: Decision, slack: Slack, now_s: float) -> bool:
        """The policy said no: offer less (True: ask again), or show why and doubt the estimate.

        Not where training waits for more: small pieces train less per second, and what was kept
        would be computed twice.
        """
        training, too_long = self._training, decision.reason is Reason.TOO_LONG
        if not (slack.idle_comes or decision.reason in (Reason.BANKING, Reason.NO_CLOCK)):
            self._held_back += 1 + self._unasked  # refusals, had it been asked each time
            if (too_long or (slack.seconds > 0 and self._held_back > PATIENCE)) and training.cut(offer.kind):
                return True
            if too_long or (slack.seconds > 0 and self._held_back > DOUBTED_AFTER):
                training.relax(offer.kind, now_s)
        training.yields(decision.reason)
        return False

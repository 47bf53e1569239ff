"""Whether the next training quantum runs now, its size and SMs (docs/internals/policy.md). Pure.

``decide`` is asked before every quantum (temporal slotting), ``choose_rung`` before every decode
step (spatial sharing). The answer's reason goes to ``harli status``, the job's sub-state and log.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_harli.core import Decision, QuantumOffer, Reason, RungChoice, RungOffer, StepLoad
from sglang_harli.managers.scheduler.policy.slo_ledger import KEPT_SHARE, Slack, Targets

# By the promise that is the tightest (``Slack.bound``).
NO_SLACK = {
    "tpot": Reason.NO_SLACK_TPOT,
    "itl": Reason.NO_SLACK_ITL,
    "ttft": Reason.NO_SLACK_TTFT,
    "none": Reason.NO_SLACK,
}
_PRICE_REFUSED = frozenset({Reason.TOO_LONG, *NO_SLACK.values()})
WORTH_WAITING = 0.1
MOST_UNASKED = 8  # decode steps


def decide(load: StepLoad, slack: Slack, offer: QuantumOffer, targets: Targets) -> Decision:
    """One quantum of at most ``rows`` rows, or none, and why.

    While nothing is served the bound is ``targets.idle_quantum_s``; a quantum that cannot be made
    that small runs all the same, since no request waits yet. While a request runs, or waits under a
    deadline (``load.promised``), a quantum's upper bound stays under the slack and
    ``targets.busy_quantum_s``.

    The largest that fits is not always worth its time: a short quantum trains less per second than
    a long one, and makes the next decode step longer all the same (``slack.decode_penalty_s``).
    Slack that is not spent stays, as banked time or as idle time. So training waits where a better
    size may fit later (``slack.later_quantum_s``), and where idle time comes: banked time is then
    kept for what requests may yet meet, unless it exceeds the longest quantum of idle time
    (``slack.idle_comes``).
    """
    if load.waiting:
        return Decision(0, 0, Reason.PREFILL_WAITING)
    if load.unclocked:
        return Decision(0, 0, Reason.NO_CLOCK)
    least_rows, least_s = offer.candidates[0]
    if load.idle:
        rows = _largest(offer, targets.idle_quantum_s) or least_rows
        return Decision(1, rows, Reason.IDLE)
    if least_s > targets.busy_quantum_s:
        return Decision(0, 0, Reason.TOO_LONG)
    rows = _largest(offer, min(slack.seconds, targets.busy_quantum_s))
    if not rows:
        return Decision(0, 0, NO_SLACK[slack.bound], targets.idle_quantum_s if slack.idle_comes else least_s)
    if slack.idle_comes:
        return Decision(0, 0, Reason.IDLE_COMES, targets.idle_quantum_s)
    if _pays_to_wait(offer, rows, slack):
        return Decision(0, 0, Reason.BANKING)
    return Decision(1, rows, Reason.SLACK)


def probe(decision: Decision, slack: Slack, offer: QuantumOffer, targets: Targets) -> Decision | None:
    """The least quantum, to measure it, where only a doubted estimate refused it
    (``QuantumOffer.doubt``).

    No other size: a doubted estimate is no promise. A probe may thus exceed the slack, and the
    caller keeps to ``slotting.PROBE_EVERY_S``.
    """
    if slack.idle_comes or decision.reason not in _PRICE_REFUSED:
        return None
    rows, upper_s = offer.candidates[0]
    if upper_s * offer.doubt > min(slack.seconds, targets.busy_quantum_s):
        return None
    return Decision(1, rows, Reason.PROBE)


def ask_again_after(decision: Decision, slack: Slack) -> int:
    """Decode steps that may pass after a refusal before the answer can change, if no request ends.

    A decision takes a few percent of a decode step of a small model, whose weights have driven it
    out of the caches (docs/internals/policy.md), so none is made where its answer is known. Half of
    the steps that it should take, at most ``MOST_UNASKED``: the clock counts too.
    """
    if not decision.needs_s or slack.bound != "tpot" or slack.seconds >= decision.needs_s:
        return 0  # not a matter of this slack
    if slack.slack_gain_s <= 0:
        return MOST_UNASKED
    return max(min(int((decision.needs_s - slack.seconds) / slack.slack_gain_s / 2), MOST_UNASKED), 0)


def _pays_to_wait(offer: QuantumOffer, rows: int, slack: Slack) -> bool:
    """Whether a size that may fit later trains ``WORTH_WAITING`` more per second than ``rows``."""
    taken_s = dict(offer.candidates)[rows] + slack.decode_penalty_s  # may be 0, so nothing is divided by it
    return any(
        later > rows
        and upper_s <= slack.later_quantum_s
        and later * taken_s >= (1 + WORTH_WAITING) * rows * (upper_s + slack.decode_penalty_s)
        for later, upper_s in offer.candidates
    )


def _largest(offer: QuantumOffer, limit_s: float) -> int:
    return next((rows for rows, upper_s in reversed(offer.candidates) if upper_s <= limit_s), 0)


# ------------------------------------------------------------------ spatial sharing
STAY = 0.03  # a rung is left for one with this much more throughput, or because it no longer fits
ABOVE = 1.001  # least price of time over the highest throughput: of equal rungs the faster wins
QUIET_STEPS = 8.0
VOIDED = 0.5  # share of the banked time that a new request, which comes with none, voids: the rest is spent by then


def choose_rung(
    load: StepLoad,
    slack: Slack,
    offers: Sequence[RungOffer],
    targets: Targets,
    *,
    quantum_s: float,
    current: int | None = None,
    steps_between_prefills: float = QUIET_STEPS,
) -> RungChoice:
    """The rung of the next decode step, and how much training is launched beside it.

    Only what fits the slack by its upper bound is considered. Where a whole step of training does
    not fit at a rung, as many quanta are launched as do: ``t`` seconds of training make the step
    ``t * (1 - T1 / T2)`` longer.

    Of what fits, the most valuable: the training done, less the price of the time taken
    (``_price``). Below the target, time costs what the fastest training would do with it, so the
    rung with the highest throughput wins. Above, a longer step spends banked time; the co-run
    penalty saturates (Harli, latency predictor), so a little training can cost nearly as much as a
    lot, and banking for a larger rung may train more.

    Hysteresis: the rung in force stays while the best one promises less than ``STAY`` more, which
    costs no deadline, as no more is launched than fits. A step down may be of any size.

    Args:
        slack: seconds that the next decode step may take (``batch_slack`` with a step of 0 s).
        offers: every rung; one with rate 0 lets training pause; current: index of that in force.
        quantum_s: upper bound of one quantum, the grain of what is launched.
        steps_between_prefills: usual decode steps between new requests, which have banked nothing.

    Returns:
        The fastest rung without training where none fits, or where a prompt waits for prefill.
    """
    if load.idle:
        best = max(range(len(offers)), key=lambda i: offers[i].rate)
        return RungChoice(best, offers[best].beside_s, offers[best].rate, Reason.IDLE)
    fastest = min(range(len(offers)), key=lambda i: offers[i].alone_s)
    if load.waiting or load.unclocked:
        reason = Reason.PREFILL_WAITING if load.waiting else Reason.NO_CLOCK
        return RungChoice(fastest, 0.0, 0.0, reason)
    price = _price(offers, targets, steps_between_prefills)
    best = RungChoice(fastest, 0.0, 0.0, NO_SLACK[slack.bound])
    worth = -price * offers[fastest].alone_s
    stays: RungChoice | None = None
    for i, offer in enumerate(offers):
        train_s = _beside(offer, slack.seconds, quantum_s)
        if not train_s:
            continue
        step_s = offer.alone_s + train_s * (1 - offer.alone_s / offer.beside_s)
        done = offer.rate * train_s
        if done - price * step_s > worth:
            best, worth = RungChoice(i, train_s, done / step_s, Reason.SLACK), done - price * step_s
        if i == current and done - price * step_s > -price * offers[fastest].alone_s:
            stays = RungChoice(i, train_s, done / step_s, Reason.SLACK)
    if stays is not None and best.train_s and best.rate <= stays.rate * (1 + STAY):
        return stays
    return best


def _beside(offer: RungOffer, limit_s: float, quantum_s: float) -> float:
    """Seconds of training that fit at a rung into a decode step within the limit."""
    if not offer.rate or offer.alone_s > limit_s:
        return 0.0
    if offer.beside_s <= limit_s:
        return offer.beside_s
    fits_s = (limit_s - offer.alone_s) / (1 - offer.alone_s / offer.beside_s)
    return fits_s // quantum_s * quantum_s


def _price(offers: Sequence[RungOffer], targets: Targets, steps_between_prefills: float) -> float:
    """What a second of step time is worth, in training.

    At least the highest throughput: that much could be done in it. Where the rung that has it takes
    longer than the target, faster steps pay for it; the price is then the best such pair's extra
    training per extra second, less what new requests void of the banked time.
    """
    highest = max(offer.rate for offer in offers)
    step_s = targets.tpot_s * (1 - KEPT_SHARE)
    alone_s = min(offer.alone_s for offer in offers)
    points = [
        (alone_s, 0.0),
        *((offer.beside_s, offer.rate * offer.beside_s) for offer in offers if offer.rate),
    ]
    longest_s = float("inf") if targets.max_itl_s is None else targets.max_itl_s
    within = [point for point in points if point[0] <= step_s]
    beyond = [point for point in points if step_s < point[0] <= longest_s]
    done, slope = max((point[1] / point[0] for point in within), default=0.0), 0.0
    for fast_s, less in within:
        for slow_s, more in beyond:
            gain = (more - less) / (slow_s - fast_s)
            mixed = (less + gain * (step_s - fast_s)) / step_s
            if mixed > done:
                done, slope = mixed, gain
    return max(ABOVE * highest, slope * (1 - VOIDED / max(steps_between_prefills, 1.0)))

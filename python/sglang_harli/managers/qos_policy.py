"""Whether the next training quantum may run now, and how large (design section 8).  Pure.

``decide`` is asked before every quantum.  It returns a reason with every answer: the reason goes to
``harli status``, to the job's sub-state and to the log.
"""

from __future__ import annotations

from sglang_harli.core import Decision, QuantumOffer, StepLoad
from sglang_harli.managers.slo_ledger import Slack, Targets

IDLE = "nothing is served"
SLACK = "slack under the latency target"
PREFILL_WAITING = "a prompt waits for prefill"
NO_SLACK = {
    "tpot": "no slack under the TPOT target",
    "itl": "no slack under --harli-max-itl-ms",
    "none": "no slack",
}
TOO_LONG = "one row exceeds --harli-max-quantum-ms: it trains while nothing is served"


def decide(load: StepLoad, slack: Slack, offer: QuantumOffer, targets: Targets) -> Decision:
    """One quantum of at most ``rows`` rows, or none, and why.

    While nothing is served the bound is ``targets.idle_quantum_s``; a quantum that cannot be made that
    small runs all the same, since nobody waits for it yet.  While a request runs, a quantum's upper
    bound stays under the batch's slack and under ``targets.busy_quantum_s``.
    """
    if load.waiting:
        return Decision(0, 0, PREFILL_WAITING)
    least_rows, least_s = offer.candidates[0]
    if load.idle:
        rows = _largest(offer, targets.idle_quantum_s) or least_rows
        return Decision(1, rows, IDLE)
    if least_s > targets.busy_quantum_s:
        return Decision(0, 0, TOO_LONG)
    rows = _largest(offer, min(slack.seconds, targets.busy_quantum_s))
    if not rows:
        return Decision(0, 0, NO_SLACK[slack.bound])
    return Decision(1, rows, SLACK)


def _largest(offer: QuantumOffer, limit_s: float) -> int:
    best = 0
    for rows, upper_s in offer.candidates:
        if upper_s <= limit_s:
            best = rows
    return best

"""Why training runs or yields now, and targets that cannot be kept here, in sentences. Pure."""

from __future__ import annotations

from typing import Any

from sglang_harli.core import Reason, SubState
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import Targets

CONSEQUENCE = "training uses idle time only"
TARGETS = {
    "tpot": "the TPOT target",
    "itl": "--harli-max-itl-ms",
    "ttft": "the TTFT target",
}


def why(sub_state: str, reason: str, serving: dict[str, Any]) -> str:
    """One sentence on ``sub_state`` and ``reason`` as last sent; ``serving``: its status."""
    unkept = serving.get("impossible_targets") or []
    if sub_state == SubState.TRAINING and reason == Reason.IDLE:
        return "Training runs in large quanta: nothing is served."
    if sub_state == SubState.TRAINING and reason == Reason.PROBE:
        return f"Training yields for the most part, and tries its smallest quantum now and then: {_slack_left(serving)}."
    if unkept and sub_state in (SubState.TRAINING, SubState.YIELDING):
        return f"Training yields until nothing is served: {'; '.join(unkept)}, so {CONSEQUENCE}."
    if sub_state == SubState.TRAINING:
        return f"Training runs between decode steps: {_slack_left(serving)}."
    if sub_state != SubState.YIELDING:
        return f"Training does not run ({sub_state.replace('_', ' ')}){': ' + reason if reason else ''}."
    if reason in qos_policy.NO_SLACK.values():
        return f"Training yields: {reason}; {_slack_left(serving)}."
    return f"Training yields: {reason}."


def _slack_left(serving: dict[str, Any]) -> str:
    slack_ms, bound = serving.get("slack_ms"), serving.get("slack_bound")
    step = (
        f"the next decode step takes {serving['decode_ms']:.3g} ms, at most {serving['decode_upper_ms']:.3g}"
    )
    if slack_ms is None or bound not in TARGETS:
        return step
    if slack_ms < 0:
        return f"{step}, which is {-slack_ms:.3g} ms more than {TARGETS[bound]} leaves"
    return f"{step}, and {TARGETS[bound]} leaves {slack_ms:.3g} ms beside it"


def impossible(targets: Targets, *, decode_s: float | None, prefill_s: float | None) -> dict[str, str]:
    """Targets (``tpot``, ``itl``, ``ttft``) below what serving alone takes, a sentence for each.

    ``decode_s``, ``prefill_s``: of one request, and of one token; None: not known.
    """
    found = {}
    for name, option, target_s, least_s, what in (
        ("tpot", "tpot-slo-ms", targets.tpot_s, decode_s, "a decode step of one request"),
        ("itl", "max-itl-ms", targets.max_itl_s, decode_s, "a decode step of one request"),
        ("ttft", "ttft-slo-ms", targets.ttft_s, prefill_s, "the shortest prefill"),
    ):
        if target_s is not None and least_s is not None and target_s < least_s:
            found[name] = (
                f"{option}={target_s * 1e3:g} cannot be kept here: {what} alone takes {least_s * 1e3:.3g} ms"
            )
    return found

"""Targets that serving alone cannot keep on this machine.  Pure."""

from __future__ import annotations

from sglang_harli.managers.scheduler.policy.slo_ledger import Targets

CONSEQUENCE = "training uses idle time only"


def impossible(targets: Targets, *, decode_s: float | None, prefill_s: float | None) -> dict[str, str]:
    """The targets (``tpot``, ``itl``, ``ttft``) below what serving alone takes, with a sentence
    each.

    ``decode_s``, ``prefill_s``: a decode step of one request, a prefill of one token; None: not
    known.
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

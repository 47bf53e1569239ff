"""What ``harli status`` shows of the run in training."""

from __future__ import annotations

from typing import Any

from sglang_harli.core import Reason
from sglang_harli.managers.scheduler.policy import explanation
from sglang_harli.managers.scheduler.training.active_run import ActiveRun


def training_status(
    run: ActiveRun, sub_state: str, reason: str, serving: dict[str, Any], totals: dict[str, Any]
) -> dict[str, Any]:
    """Plain values; ``sub_state`` and ``reason`` as sent last, ``totals``: ``CoTrainer.totals``."""
    return {
        "job": run.spec.job,
        "attempt": run.spec.attempt,
        "step": run.training.applied_step,
        "total_steps": run.spec.total_steps,
        "sub_state": sub_state,
        "reason": reason,
        "why": explanation.why(sub_state, reason, serving),
        "idle_only": reason == Reason.TOO_LONG or bool(serving.get("impossible_targets")),
        "batches_ahead": run.training.batches_ahead,
        "bytes_ahead": run.training.bytes_ahead,
        "spilled": run.training.spilled,
        **totals,
    }

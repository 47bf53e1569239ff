"""The hyperparameters of a job with defaults and bounds, for ``harli submit --help``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from sglang_harli import architectures
from sglang_harli.protocol import accepted, public

CHOICES = {
    "lr_scheduler": public.SCHEDULERS,
    "on_overflow": public.OVERFLOWS,
    "target_modules": architectures.ALL_LINEAR,
    "use_rslora": ("true", "false"),
    "publish_best": ("true", "false"),
}
NOTES = {
    "warmup_ratio": "share of all steps; the first warm-up step has rate 0",
    "max_seq_length": "tokens",
    "max_grad_norm": "0 turns clipping off",
    "checkpoint_every": "optimizer steps; 0: on pause and at the end only",
    "batch_size": "rows of a micro-batch",
    "eval_steps": "optimizer steps between evaluations; 0: at the end only",
    "eval_rows": "of an evaluation; all of them at the end",
    "validation_split": "share of the rows that is evaluated, not trained",
    "early_stopping_patience": "evaluations in a row without a better valid_loss",
    "early_stopping_min_delta": "what counts as better",
    "publish_best": "the checkpoint of the lowest valid_loss, not the last one",
    "on_overflow": "what becomes of rows over max_seq_length",
}


_NONE = {
    "max_seq_length": "the model's limit",
    "eval_steps": f"{public.DEFAULT_EVAL_STEPS} where there is validation data",
    "eval_rows": "all of them",
    "early_stopping_patience": "none",
}


def describe() -> Iterator[tuple[str, str]]:
    """(name, what is accepted) of each, read from the protocol's own declaration."""
    for field in msgspec.structs.fields(public.Hyperparameters):
        name = field.encode_name
        parts = [f"default {_default(name, field.default)}"]
        if name in CHOICES:
            parts.append(("any of " if name == "target_modules" else "one of ") + ", ".join(CHOICES[name]))
        else:
            parts.append(accepted.wording(field.type))
        if name in NOTES:
            parts.append(NOTES[name])
        yield name, "; ".join(parts)


def _default(name: str, value: Any) -> str:
    if name == "target_modules":
        return "all of them, separated by commas"
    if value is None:
        return _NONE[name]
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

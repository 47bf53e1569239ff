"""The hyperparameters of a job with defaults and bounds, for ``harli submit --help``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from sglang_harli.protocol import public

CHOICES = {
    "lr_scheduler": public.SCHEDULERS,
    "on_overflow": public.OVERFLOWS,
    "target_modules": public.ALL_LINEAR,
    "use_rslora": ("true", "false"),
}
NOTES = {
    "warmup_ratio": "share of all steps; the first warm-up step has rate 0",
    "max_seq_length": "tokens",
    "max_grad_norm": "0 turns clipping off",
    "checkpoint_every": "optimizer steps; 0: on pause and at the end only",
    "batch_size": "rows of a micro-batch",
    "on_overflow": "what becomes of rows over max_seq_length",
}
SIGNS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def describe() -> Iterator[tuple[str, str]]:
    """(name, what is accepted) of each, read from the protocol's own declaration."""
    declared = inspect.type_info(public.Hyperparameters)
    assert isinstance(declared, inspect.StructType)
    for field in declared.fields:
        name = field.encode_name
        kinds = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
        parts = [f"default {_default(name, field.default)}", *_bounds(kinds[0])]
        if name in CHOICES:
            parts.append(("any of " if name == "target_modules" else "one of ") + ", ".join(CHOICES[name]))
        if name in NOTES:
            parts.append(NOTES[name])
        yield name, "; ".join(parts)


def _default(name: str, value: Any) -> str:
    if name == "target_modules":
        return "all of them, separated by commas"
    if name == "max_seq_length":
        return "the model's limit"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _bounds(kind: Any) -> list[str]:
    found = [(word, getattr(kind, sign, None)) for sign, word in SIGNS]
    return [", ".join(f"{word} {value:,}" for word, value in found if value is not None)] * any(
        value is not None for _, value in found
    )

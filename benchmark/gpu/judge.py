"""What must hold of the figures that a GPU gave.  Pure: a test breaks each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DECODE_RATIO = 1.02  # decode with no job, of plain SGLang's
ATTAINMENT = 0.99  # requests within target, of serve-only's
TRAIN_SHARE = 0.45  # of the measured bf16 matrix rate, 8k tokens a micro-batch on 8B
PEFT_RATIO = 1.1  # train-only, of the transformers + peft loop's tokens per second
PREDICTED = 0.05  # mean error of a predicted decode step


@dataclass(frozen=True, slots=True)
class Row:
    """A statement; ``holds`` None: it was not measured."""

    what: str
    bound: str
    value: float | None
    holds: bool | None


def at_most(what: str, value: float | None, bound: float) -> Row:
    return _row(what, f"at most {bound:g}", value, lambda v: v <= bound)


def at_least(what: str, value: float | None, bound: float) -> Row:
    return _row(what, f"at least {bound:g}", value, lambda v: v >= bound)


def is_so(what: str, value: bool | None) -> Row:
    return Row(what, "yes", None if value is None else float(value), value)


def _row(what: str, bound: str, value: float | None, holds: Callable[[float], bool]) -> Row:
    if value is None:
        return Row(what, bound, None, None)
    return Row(what, bound, float(value), math.isfinite(value) and holds(value))


def rows_of(part: int, sections: dict[str, Any]) -> list[Row]:
    """The rows of one part from its sections; what is not there is not measured."""
    return {1: _platform, 2: _training, 3: _server, 4: _traffic}[part](sections)


def _platform(found: dict[str, Any]) -> list[Row]:
    moved = _of(found, "moves", "rows")
    contents = None if moved is None else all(row["contents_right"] for row in moved)
    return [
        is_so("memory that was lent comes back as zeros, and nothing else changes", contents),
        is_so("a CUDA graph replays right over memory that moved", _of(found, "graph", "right")),
    ]


def _training(found: dict[str, Any]) -> list[Row]:
    return [
        is_so("losses are those of the CPU", _of(found, "losses", "equal")),
        is_so("no quantum waits for the device", _of(found, "waits", "none")),
        at_least(
            "train-only on 8B, of the measured bf16 matrix rate",
            _of(found, "speed", "share_of_matrix_rate"),
            TRAIN_SHARE,
        ),
        at_least(
            "train-only, of a transformers + peft loop",
            _of(found, "speed", "of_the_peft_loop"),
            PEFT_RATIO,
        ),
    ]


def _server(found: dict[str, Any]) -> list[Row]:
    rows = [
        at_most("decode with no job, of plain SGLang's", _of(found, "decode", "ratio"), DECODE_RATIO),
        *(
            is_so(f"greedy output {when} training is that before it", _of(found, "greedy", when))
            for when in ("during", "after")
        ),
        is_so("a finished job's adapter is listed and answers", _of(found, "adapter", "answers")),
        *_co_serving("at a steady load", _of(found, "co_serving")),
    ]
    others = {name: one for name, one in found.items() if name.startswith("backing ")}
    for name, one in sorted(others.items()):
        rows += [is_so(f"{name}: greedy output is that without training", _of(one, "greedy_equal"))]
        rows += _co_serving(name, one.get("co_serving"))
    return rows


def _traffic(found: dict[str, Any]) -> list[Row]:
    rates = sorted(name for name in found if name.startswith("rate "))
    rows: list[Row] = []
    for name in rates or ["rate (none was measured)"]:
        rows += _co_serving(name, found.get(name))
    error = _of(found, "predictor", "error")
    return [*rows, at_most("mean error of a predicted decode step", error, PREDICTED)]


def _co_serving(where: str, found: dict[str, Any] | None) -> list[Row]:
    """Of a window with training and one without it, on the same requests."""
    trained = _of(found, "finetune_tokens_per_s")
    return [
        at_least(f"{where}: requests within target, of serve-only's", _ratio(found), ATTAINMENT),
        is_so(f"{where}: training goes on", None if trained is None else trained > 0),
        at_most(f"{where}: a reclaim (p50), of one decode step (p50)", _of(found, "reclaim_of_step"), 1.0),
    ]


def _ratio(found: dict[str, Any] | None) -> float | None:
    alone, together = _of(found, "serve_only", "within_target"), _of(found, "together", "within_target")
    if alone is None or together is None or not alone:
        return None
    return together / alone


def _of(found: Any, *names: str) -> Any:
    """A value of nested dictionaries; None: it is not there."""
    for name in names:
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found

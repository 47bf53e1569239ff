"""Results of a co-location benchmark in which everything holds, by a little, and ways to break
them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

from colocate import noise
from colocate.judge import (
    BURST,
    DEFAULT,
    HARLI,
    IDLE,
    NICE,
    PLAIN_LOOP,
    SERVE,
    SHIFT,
    SLICES,
    TRAIN,
    UNCOORDINATED,
)

TARGETS = {"1.5x": 15.0, "2x": 20.0, "4x": 40.0}
REQUESTS = 40
Found = dict[str, Any]


def cell(mode: str, load: int | str, setting: str = "", *, repetition: int = 1, **changes: Any) -> Found:
    base: Found = {
        "mode": mode,
        "setting": setting,
        "load": load,
        "repetition": repetition,
        "disturbed": None,
        "pss_bytes": 2 * 2**30 if mode not in (UNCOORDINATED, NICE) else 3 * 2**30,
    }
    if load != IDLE:
        count = 16 if load == BURST else REQUESTS
        base |= {
            "tpots_ms": [10.0 + 0.01 * n for n in range(count)],
            "ttfts_ms": [50.0 + n for n in range(count)],
            "tokens": [32] * count,
            "gap_ms": {"p50": 10.0, "p99": 30.0, "p100": 40.0},
            "seconds": 20.0,
            "late": 0,
        }
    return base | changes


def repetition(n: int) -> list[Found]:
    """Cells in which everything holds, by a little, with some spread."""
    wobble = 1 + 0.002 * (n - 2)
    prediction = {"mape": 0.04 + 0.001 * n, "coverage": 0.99, "steps": 500}
    limits = {"idle": 250.0, "busy": 40.0}
    cells = [
        cell(TRAIN, IDLE, tokens_per_s=2000.0 * wobble),
        cell(HARLI, IDLE, DEFAULT, tokens_per_s=1990.0 * wobble, train_only_tokens_per_s=2010.0 * wobble),
        cell(PLAIN_LOOP, IDLE, "4 rows", tokens_per_s=1600.0),
        cell(PLAIN_LOOP, IDLE, "2 rows", tokens_per_s=1900.0),
        cell(SERVE, BURST),
        cell(HARLI, BURST, "2x", limits_ms=limits, tokens_per_s=100.0),
        cell(HARLI, SHIFT, "2x", tokens_per_s=1.0, shift={"after": {"coverage": 0.995}, "steps": 410}),
    ]
    for load, idle in ((40, 0.6), (80, 0.2)):
        cells.append(cell(SERVE, load, busy=1 - idle))
        cells += [
            cell(
                HARLI,
                load,
                label,
                tokens_per_s=0.95 * idle * 2000.0,
                train_only_tokens_per_s=2000.0,
                prediction=prediction,
                limits_ms=limits,
            )
            for label in TARGETS
        ]
    late = [1000.0] * REQUESTS
    cells += [
        cell(UNCOORDINATED, 40, "2 threads", tokens_per_s=1700.0, tpots_ms=late),
        cell(NICE, 40, "1 thread", tokens_per_s=300.0 * wobble),
        cell(SLICES, 40, "10 ms", tokens_per_s=700.0, prediction=prediction),
    ]
    return [c | {"repetition": n} for c in cells]


def results() -> Found:
    return {
        "device": "cpu",
        "model_size": "25m",
        "flags": "",
        "targets": {"40": dict(TARGETS), "80": dict(TARGETS)},
        "baseline": {"load": 40, "target": "2x"},
        "calibration": {
            "tpot_ms": 9.0,
            "loads": {load: {"rate": 2.0, "tpot_ms": 10.0} for load in ("40", "80")},
        },
        "noise_rule": noise.RULE,
        "repetitions_done": 3,
        "cells": [c for n in (1, 2, 3) for c in repetition(n)],
    }


Change = Callable[[Found], None]


def of(mode: str, load: int | str, setting: str | None = None, **changes: Any) -> Change:
    def change(found: Found) -> None:
        hit = [
            c
            for c in found["cells"]
            if c["mode"] == mode and c["load"] == load and setting in (None, c["setting"])
        ]
        assert hit
        for c in hit:
            c.update({name: value(c) if callable(value) else value for name, value in changes.items()})

    return change


def late(count: int) -> Callable[[Found], list[float | None]]:
    """So many requests that did not end."""
    return lambda c: [None] * count + c["tpots_ms"][count:]


def slow(place: int, value: float) -> Callable[[Found], list[float]]:
    return lambda c: [value if n == place else t for n, t in enumerate(c["ttfts_ms"])]

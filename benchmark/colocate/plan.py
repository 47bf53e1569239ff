"""Which cells the co-location benchmark measures in a repetition, and at which targets (pure)."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Any

from colocate.judge import (
    ALL,
    APART,
    BURST,
    DEFAULT,
    FEW,
    HARLI,
    HOPELESS,
    IDLE,
    NICE,
    PAUSED,
    PLAIN_LOOP,
    SEPARATE,
    SERVE,
    SHIFT,
    SLICES,
    TRAIN,
    UNCOORDINATED,
    kept,
)
from colocate.trainer import STEP_ROWS

BURST_REQUESTS = 32  # as many as the servers run at once
SHIFT_REQUESTS, SHIFT_AFTER_S = 60, 5.0
REFERENCE = 0.2  # of the seconds of a cell without requests
DUTIES = (0.5, 0.25, 0.1, 0.05)
SLICES_MS = {"cpu": (5.0, 10.0, 20.0, 40.0), "cuda": (10.0, 20.0)}


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure once.

    Attributes:
        mode: one of ``colocate_judge``'s.
        setting: of the mode: a target's label, ``2 threads``, ``duty 0.25``, ``10 ms``, ``4 rows``.
        load: per cent busy, 0 for no requests, or ``BURST`` or ``SHIFT``.
        rate: requests per second.
        target_ms, slice_ms: set in our server.
        rows, threads, duty: of the plain loop.
        seconds: of a cell without requests; of train-only right before and after one of ours beside
            requests.
        limit_s: requests that have not ended by then are late.
    """

    mode: str
    setting: str
    load: int | str
    repetition: int
    requests: int = 0
    rate: float = 0.0
    target_ms: float | None = None
    slice_ms: float | None = None
    rows: int = STEP_ROWS
    threads: int = 2
    duty: float = 1.0
    seconds: float = 0.0
    limit_s: float = 3600.0


def plan(options: argparse.Namespace, results: dict[str, Any], repetition: int) -> list[Cell]:
    """The cells of a repetition, in the order in which they are thought of (see ``in_blocks``)."""
    modes, cells = options.modes, []
    quiet = {"load": IDLE, "repetition": repetition, "seconds": options.seconds}
    if TRAIN in modes:
        cells.append(Cell(TRAIN, "", **quiet))
    if HARLI in modes and IDLE in options.loads:
        cells.append(Cell(HARLI, DEFAULT, **quiet))
    if PLAIN_LOOP in modes:
        cells += [Cell(PLAIN_LOOP, f"{rows} row{'s' * (rows > 1)}", rows=rows, **quiet) for rows in (4, 2, 1)]
    for load, targets in results["targets"].items():
        of_load = {
            "load": int(load),
            "repetition": repetition,
            "rate": results["calibration"]["loads"][load]["rate"],
        }
        cells.append(Cell(SERVE, ALL, requests=options.requests, **of_load))
        if PAUSED in modes:
            cells.append(Cell(PAUSED, ALL, requests=options.requests, **of_load))
        if HARLI in modes:
            cells += [
                Cell(
                    HARLI,
                    label,
                    requests=options.requests,
                    target_ms=target_ms,
                    seconds=options.seconds * REFERENCE,
                    **of_load,
                )
                for label, target_ms in targets.items()
            ]
        at = results["baseline"]
        if at and int(load) == at["load"]:
            baselines = _baselines(options, targets, at, {**of_load, "requests": options.baseline_requests})
            cells += [cell for cell in baselines if not _hopeless(results, cell)]
            if not options.quick and options.device == "cpu" and HARLI in modes:
                cells += _special(at, targets, of_load)
    return cells


def plan_lacking(options: argparse.Namespace, results: dict[str, Any], repetition: int) -> list[Cell]:
    """Cells of serve-only and harli that are to be measured once more than was planned.

    Those for which fewer requests than asked for in all repetitions are left, where disturbed cells
    are left out.
    """
    asked = options.requests * options.repetitions
    lacking: set[tuple[int | str, str]] = set()
    for load, targets in results["targets"].items():
        for label, target_ms in targets.items():
            found = kept(results["cells"], HARLI, label, int(load), target_ms)
            if HARLI in options.modes and (found is None or found.n < asked):
                lacking |= {(int(load), label), (int(load), ALL)}
    return [
        cell
        for cell in plan(options, results, repetition)
        if cell.mode in (SERVE, HARLI) and cell.load and (cell.load, cell.setting) in lacking
    ]


def in_blocks(cells: list[Cell], rng: random.Random) -> list[Cell]:
    """Load by load, in an order drawn anew, and so the cells of each: a machine's speed changes
    within minutes.

    Separate processes end after three times serve-only's time, so they come behind the serve-only
    cell with the same requests.
    """
    loads = list(dict.fromkeys(cell.load for cell in cells))
    rng.shuffle(loads)
    ordered: list[Cell] = []
    for load in loads:
        block = [cell for cell in cells if cell.load == load]
        rng.shuffle(block)
        alone = {cell.requests: n for n, cell in enumerate(block) if cell.mode == SERVE}
        waits = [cell.mode in SEPARATE and alone[cell.requests] > n for n, cell in enumerate(block)]
        ordered += [cell for cell, late in zip(block, waits, strict=True) if not late]
        ordered += [cell for cell, late in zip(block, waits, strict=True) if late]
    return ordered


def _hopeless(results: dict[str, Any], cell: Cell) -> bool:
    """Whether a setting of separate processes kept so little before that it need not be measured
    again."""
    at = results["baseline"]
    if cell.mode not in SEPARATE:
        return False
    target_ms = results["targets"][str(at["load"])][at["target"]]
    share = kept(results["cells"], cell.mode, cell.setting, at["load"], target_ms)
    return share is not None and share.value < HOPELESS


def _baselines(
    options: argparse.Namespace, targets: dict[str, float], at: dict[str, Any], of_load: dict[str, Any]
) -> list[Cell]:
    modes, cells = options.modes, []
    if options.baseline_requests != options.requests and modes & {*SEPARATE, SLICES}:
        cells.append(Cell(SERVE, FEW, **of_load))
        if HARLI in modes:
            label = at["target"]
            cells.append(Cell(HARLI, label + APART + FEW, target_ms=targets[label], **of_load))
    if UNCOORDINATED in modes:
        cells.append(Cell(UNCOORDINATED, "2 threads", **of_load))
    if NICE in modes:
        cells.append(Cell(NICE, "1 thread", threads=1, **of_load))
        if not options.quick:
            cells.append(Cell(NICE, "2 threads", threads=2, **of_load))
            cells += [Cell(NICE, f"1 thread, duty {d:g}", threads=1, duty=d, **of_load) for d in DUTIES]
    if SLICES in modes:
        cells += [Cell(SLICES, f"{ms:g} ms", slice_ms=ms, **of_load) for ms in SLICES_MS[options.device]]
    return cells


def _special(at: dict[str, Any], targets: dict[str, float], of_load: dict[str, Any]) -> list[Cell]:
    """A burst from idle to full load, and half of a core taken away under load."""
    label = at["target"]
    burst = {**of_load, "load": BURST, "rate": math.inf, "requests": BURST_REQUESTS}
    shift = {**of_load, "load": SHIFT, "requests": SHIFT_REQUESTS, "seconds": SHIFT_AFTER_S}
    return [
        Cell(SERVE, "", **burst),
        Cell(HARLI, label, target_ms=targets[label], **burst),
        Cell(HARLI, label, target_ms=targets[label], **shift),
    ]


def targets_of(options: argparse.Namespace, median_ms: float) -> dict[str, float]:
    """Targets by label."""
    found = {f"{multiple:g}x": multiple * median_ms for multiple in options.targets}
    return found | {f"{ms:g} ms": ms for ms in options.targets_ms}


def baseline_of(medians_ms: dict[str, float], targets: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """Where baselines are compared: at 40% busy and twice the median TPOT, or what is nearest to
    them."""
    loads = [int(load) for load in targets]
    if not loads:
        return None
    load = min(loads, key=lambda share: abs(share - 40))
    median_ms = medians_ms[str(load)]
    labels = targets[str(load)]
    return {
        "load": load,
        "target": min(labels, key=lambda name: abs(math.log(labels[name] / (2 * median_ms)))),
    }

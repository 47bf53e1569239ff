"""The co-location benchmark as tables (pure)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from colocate.judge import (
    ALL,
    BURST,
    HARLI,
    IDLE,
    MODES,
    SEPARATE,
    SERVE,
    SLICES,
    TRAIN,
    Cells,
    Interval,
    Row,
    efficiencies,
    harvests,
    kept,
    label_of,
    of,
    on_time,
    ratios,
    settings_of,
    with_few,
)
from common.load import percentile

LATE_MS = math.inf


def groups(cells: Cells) -> list[tuple[int | str, str, str]]:
    """(load, mode, setting) of what was measured, in the order that tables show."""
    found = list(dict.fromkeys((cell["load"], cell["mode"], cell["setting"]) for cell in cells))
    loads = [*sorted(x for x in {g[0] for g in found} if isinstance(x, int))]
    loads += [x for x in dict.fromkeys(g[0] for g in found) if isinstance(x, str)]
    return sorted(found, key=lambda g: (loads.index(g[0]), MODES.index(g[1])))


def members(cells: Cells, load: int | str, mode: str, setting: str) -> tuple[Cells, int]:
    """Cells of a group that count, or all of them where every one was disturbed; and how many were
    left out."""
    found = [c for c in cells if (c["load"], c["mode"], c["setting"]) == (load, mode, setting)]
    clean = [c for c in found if c["disturbed"] is None]
    return clean or found, len(found) - len(clean)


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Median, and the range in brackets where there are several."""
    text = form.format(statistics.median(values))
    if len(values) > 1:
        text += f" ({form.format(min(values))} to {form.format(max(values))})"
    return text


def times(cells: Cells, name: str) -> str:
    """Mean / p50 / p90 / p99 of the requests of all repetitions; late ones are infinite, and out of
    the mean."""
    values = sorted(LATE_MS if t is None else t for cell in cells for t in cell[name])
    ended = [v for v in values if v < LATE_MS]
    if not ended:
        return "-"
    found = [statistics.fmean(ended), *(percentile(values, p) for p in (50, 90, 99))]
    return " / ".join("late" if v == LATE_MS else f"{v:.1f}" for v in found)


def main_table(results: dict[str, Any]) -> str:
    """A line for each load, mode and setting."""
    cells = results["cells"]
    lines = [
        "| % busy | mode | setting | requests | TPOT mean / p50 / p90 / p99, ms | TTFT mean / p50 / p90 / p99, ms "
        "| p99 gap, ms | within target | finetune tokens/s | harvest | efficiency | memory, MiB | left out |",
        "|" + "---|" * 13,
    ]
    for load, mode, setting in groups(cells):
        found, left_out = members(cells, load, mode, setting)
        serving = [c for c in found if "tpots_ms" in c]
        training = [c["tokens_per_s"] for c in found if "tokens_per_s" in c]
        gaps = [c["gap_ms"]["p99"] for c in serving if c["gap_ms"]]
        paired = mode == HARLI and all("train_only_tokens_per_s" in c for c in found)
        harvest = ratios(of(cells, mode, load, setting), of(cells, TRAIN, IDLE)) if training else {}
        harvest = harvests(cells, load, setting) if paired else harvest
        gained = efficiencies(cells, load, setting) if paired and isinstance(load, int) and load else []
        row = [
            _load(load, found),
            mode,
            setting or "-",
            str(sum(len(c["tpots_ms"]) for c in serving) or "-"),
            times(serving, "tpots_ms") if serving else "-",
            times(serving, "ttfts_ms") if serving else "-",
            spread(gaps, "{:.1f}") if gaps else "-",
            _within(results, load, mode, setting, serving),
            spread(training) if training else "-",
            f"{statistics.median(harvest.values()):.3f}" if harvest else "-",
            spread(gained, "{:.3f}") if gained else "-",
            f"{max(c['pss_bytes'] for c in found) / 2**20:.0f}",
            f"{left_out}{' (all)' if left_out and left_out == len(found) else ''}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _load(load: int | str, found: Cells) -> str:
    busy = [c["busy"] for c in found if c.get("busy") is not None]
    return f"{load} (measured {statistics.median(busy):.1%})" if busy and load else str(load)


def targets_at(results: dict[str, Any], load: int | str) -> dict[str, float]:
    """Targets by label; a burst is judged by those of the baselines' load."""
    at = results["baseline"]
    load = at["load"] if isinstance(load, str) and at else load
    return results["targets"].get(str(load), {})


def _within(results: dict[str, Any], load: int | str, mode: str, setting: str, serving: Cells) -> str:
    """Share of requests on time: of a mode that has a target, for it; of others for each."""
    if not serving:
        return "-"
    targets = targets_at(results, load)
    if mode == HARLI:
        targets = {k: v for k, v in targets.items() if k == label_of(setting)}
    parts = []
    for label, target_ms in targets.items():
        flags = [flag for cell in serving for flag in on_time(cell, target_ms)]
        parts.append(f"{label}: {statistics.fmean(flags):.1%}")
    return ", ".join(parts) or "-"


def verdicts(rows: Sequence[Row]) -> str:
    lines = ["| must hold | bound | found | 95% interval | of | |", "|---|---|---|---|---|---|"]
    for row in rows:
        sign = "at least" if row.at_least else "at most"
        lines.append(f"| {row.text} | {sign} {row.bound:g} | {_interval(row.found)} | {row.verdict} |")
    return "\n".join(lines)


def _interval(found: Interval | None) -> str:
    if found is None:
        return "- | - | -"
    inside = (
        f"{found.lower:.3f} to {found.upper:.3f}" if math.isfinite(found.lower) else "one repetition: none"
    )
    return f"{found.value:.3f} | {inside} | {found.n}"


def baselines(results: dict[str, Any]) -> str:
    """Which settings of the baselines keep serve-only's share, and the best of those in each
    mode."""
    at, cells = results["baseline"], results["cells"]
    if at is None:
        return ""
    target_ms = results["targets"][str(at["load"])][at["target"]]
    lines = []
    for mode in (*SEPARATE, SLICES):
        keep = {}
        for setting in settings_of(cells, mode):
            share = kept(cells, mode, setting, at["load"], target_ms)
            if share is not None and share.value >= 0.99:
                speeds = [c["tokens_per_s"] for c in of(cells, mode, at["load"], setting).values()]
                keep[setting] = statistics.median(speeds)
        if keep:
            best = max(keep, key=lambda name: keep[name])
            lines.append(
                f"- {mode}: best setting that keeps 99% of serve-only's share: {best}, {keep[best]:.0f} tokens/s"
            )
        elif settings_of(cells, mode):
            lines.append(f"- {mode}: no setting keeps 99% of serve-only's share")
    if lines and (ours := with_few(cells, at["load"], at["target"])):
        speed = statistics.median(cell["tokens_per_s"] for cell in ours.values())
        lines.append(f"- {HARLI}, with the same requests: {speed:.0f} tokens/s")
    return (
        f"At {at['load']}% busy, target {at['target']} ({target_ms:.1f} ms):\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def prediction(results: dict[str, Any]) -> str:
    """The predictor's figures of the cells with requests."""
    found = [
        c for c in results["cells"] if c["mode"] in (HARLI, SLICES) and c.get("prediction") and c["load"]
    ]
    if not found:
        return ""
    mapes, covered = [c["prediction"]["mape"] for c in found], [c["prediction"]["coverage"] for c in found]
    return (
        f"Predicted decode steps, the latest 200 of each cell: error {spread(mapes, '{:.1%}')}, within the upper bound "
        f"{spread(covered, '{:.1%}')}."
    )


def effective_targets(results: dict[str, Any]) -> str:
    """Targets as multiples of what serve-only's median turned out to be in the run."""
    found = []
    for load, targets in results["targets"].items():
        cells = of(results["cells"], SERVE, int(load), ALL).values()
        ended = [t for cell in cells for t in cell["tpots_ms"] if t is not None]
        if ended:
            median_ms = statistics.median(ended)
            times = ", ".join(f"{label} {ms / median_ms:.2f}" for label, ms in targets.items())
            found.append(f"{load}%: {median_ms:.2f} ms, of which the targets are {times}")
    return f"Serve-only's median TPOT in the run itself: {'; '.join(found)}." if found else ""


def page(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """Everything that is printed, as Markdown."""
    calibration = results["calibration"]
    loads = "; ".join(
        f"{load}%: {found['rate']:.2f} requests/s, median TPOT {found['tpot_ms']:.2f} ms, targets "
        + ", ".join(f"{label} {ms:.1f}" for label, ms in results["targets"][load].items())
        for load, found in calibration["loads"].items()
    )
    parts = [
        main_table(results),
        f"Serve-only, calibrated: one request alone {calibration['tpot_ms']:.2f} ms a token; {loads}.",
        effective_targets(results),
        baselines(results),
        prediction(results),
        verdicts(rows),
        f"Noise. {results['noise_rule']}. {results['repetitions_done']} repetitions."
        + _sittings(results.get("commits", ())),
    ]
    return "\n\n".join(part for part in parts if part)


def _sittings(commits: Sequence[str | None]) -> str:
    """Where a run was ended and resumed: at which commits it was measured."""
    if len(commits) < 2:
        return ""
    return f" Measured in {len(commits)} sittings, on the same targets and rates, at commits {', '.join(map(str, commits))}."


def line(cell: dict[str, Any]) -> str:
    """A measured cell in one line, for the terminal."""
    text = f"[{cell['repetition']}] {cell['load']!s:>5} {cell['mode']}" + (
        f", {cell['setting']}" if cell["setting"] else ""
    )
    if "tpots_ms" in cell:
        ended = [t for t in cell["tpots_ms"] if t is not None]
        median = f"{statistics.median(ended):.1f}" if ended else "-"
        text += f": {len(cell['tpots_ms'])} requests in {cell['seconds']:.0f} s, TPOT {median} ms"
        text += f", {cell['late']} late" if cell["late"] else ""
    if cell["mode"] == SERVE and cell["load"] != BURST:
        text += f", busy {cell['busy']:.1%}"
    text += f", {cell['tokens_per_s']:.0f} finetune tokens/s" if "tokens_per_s" in cell else ""
    return text + (f" (disturbed: {cell['disturbed']})" if cell["disturbed"] else "")

"""Finetune throughput against SLO attainment, a panel for each load, in SVG made by hand (pure)."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from colocate.judge import HARLI, MODES, PAUSED, SERVE, label_of, on_time
from colocate.report import groups, members, targets_at

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 430, 330, 58, 20, 40, 46
COLOURS = {
    SERVE: "#8a8f98",
    "two processes": "#b0413e",
    "nice 19": "#c98a2b",
    "fixed slices": "#7d6bb0",
    PAUSED: "#6a9a78",
    HARLI: "#2f6f8f",
}


def points(results: dict[str, Any], load: int) -> list[tuple[str, str, float, float]]:
    """(mode, setting, share within target in per cent, finetune tokens/s), medians over
    repetitions.

    A mode without a target of its own is judged by the one that the baselines are compared at.
    """
    targets = targets_at(results, load)
    at = results["baseline"]
    found = []
    for at_load, mode, setting in groups(results["cells"]):
        label = label_of(setting) if mode == HARLI else at and at["target"]
        if at_load != load or label not in targets:
            continue
        cells, _ = members(results["cells"], load, mode, setting)
        flags = [flag for cell in cells for flag in on_time(cell, targets[label])]
        speed = statistics.median(cell.get("tokens_per_s", 0.0) for cell in cells)
        found.append((mode, setting, 100.0 * statistics.fmean(flags), speed))
    return found


def svg(results: dict[str, Any]) -> str | None:
    """None where no load has requests."""
    panels = {int(load): points(results, int(load)) for load in results["targets"]}
    panels = {load: found for load, found in panels.items() if found}
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = (len(panels) + 1) // 2
    width, height = WIDTH * columns, PANEL * rows + 34
    most = max((p[3] for found in panels.values() for p in found), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (load, found) in enumerate(panels.items()):
        parts += _panel((number % 2) * WIDTH, (number // 2) * PANEL, f"{load}% busy", found, most)
    x = 14
    for mode in (m for m in MODES if any(p[0] == m for found in panels.values() for p in found)):
        parts.append(f'<circle cx="{x}" cy="{height - 16}" r="5" fill="{COLOURS[mode]}"/>')
        parts.append(f'<text x="{x + 10}" y="{height - 12}">{escape(mode)}</text>')
        x += 28 + 7 * len(mode)
    return "\n".join([*parts, "</svg>", ""])


def _panel(x: int, y: int, title: str, found: list[tuple[str, str, float, float]], most: float) -> list[str]:
    wide, high = WIDTH - LEFT - RIGHT, PANEL - TOP - BOTTOM
    left, bottom = x + LEFT, y + TOP + high
    parts = [
        f'<text x="{left}" y="{y + 24}" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{left}" y="{y + TOP}" width="{wide}" height="{high}" fill="none" stroke="#c9ccd1"/>',
        f'<text x="{left + wide / 2}" y="{bottom + 36}" text-anchor="middle">requests within target, %</text>',
        f'<text x="{left}" y="{y + TOP - 4}" fill="#6b7078" font-size="11">finetune tokens/s</text>',
    ]
    for tick in range(0, 101, 25):
        at = left + wide * tick / 100
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    for share in (0.0, 0.5, 1.0):
        at = bottom - high * share / 1.1
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{most * share:.0f}</text>')
    for mode, setting, share, speed in found:
        cx, cy = left + wide * share / 100, bottom - high * speed / most / 1.1
        parts.append(
            f'<circle class="point" cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{COLOURS[mode]}" fill-opacity="0.85"/>'
        )
        if setting:
            parts.append(
                f'<text x="{cx - 8:.1f}" y="{cy + 4:.1f}" text-anchor="end" font-size="10" fill="#4a4e55">'
                f"{escape(setting)}</text>"
            )
    return parts

"""The benchmark's table as bars, in SVG made by hand (pure)."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from pool.judge import MODES, UNIFIED

WIDTH, PANEL, BAR, LEFT = 860, 200, 26, 130
COLOURS = {
    "plain SGLang": "#8a8f98",
    "static 50/50": "#c9a66b",
    "static 80/20": "#b98b4e",
    UNIFIED: "#2f6f8f",
}


def panels(results: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """(title, value of each mode) of each panel; a mode that has no such value is left out."""
    capacity, launches = results["capacity"], results["launches"]

    def over(name: str, factor: float = 1.0) -> dict[str, float]:
        found = {}
        for mode in MODES:
            values = [launch[mode][name] for launch in launches if launch[mode][name] is not None]
            if values:
                found[mode] = factor * statistics.median(values)
        return found

    def rows(kind: str) -> dict[str, float]:
        return {mode: float(capacity[kind][mode]) for mode in MODES if mode in capacity[kind]}

    return [
        ("peak tokens cached", over("peak_tokens")),
        ("largest micro-batch, rows (saved inputs)", rows("saved")),
        ("prefix hit rate, %", over("hit_rate", 100.0)),
        ("finetune tokens/s on the trace", over("tokens_per_s")),
    ]


def svg(results: dict[str, Any]) -> str:
    """Four panels of horizontal bars, two in a row."""
    found = panels(results)
    height = PANEL * ((len(found) + 1) // 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, values) in enumerate(found):
        x, y = (number % 2) * WIDTH // 2, (number // 2) * PANEL
        parts += _panel(x, y, title, values)
    return "\n".join([*parts, "</svg>", ""])


def _panel(x: int, y: int, title: str, values: dict[str, float]) -> list[str]:
    room = WIDTH // 2 - LEFT - 70
    most = max(values.values(), default=0.0) or 1.0
    parts = [f'<text x="{x + 12}" y="{y + 26}" font-weight="bold">{escape(title)}</text>']
    for number, (mode, value) in enumerate(values.items()):
        top = y + 44 + number * (BAR + 8)
        length = round(room * value / most, 1)
        parts += [
            f'<text x="{x + LEFT - 8}" y="{top + 18}" text-anchor="end">{escape(mode)}</text>',
            f'<rect x="{x + LEFT}" y="{top}" width="{length}" height="{BAR}" fill="{COLOURS[mode]}"/>',
            f'<text x="{x + LEFT + length + 6}" y="{top + 18}">{value:.4g}</text>',
        ]
    return parts

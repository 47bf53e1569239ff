"""Bytes of the pool by owner over time, as stacked areas: SVG made by hand (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pool.flow_judge import MIB, Sample, Span

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 44
# From the bottom up: what the KV cache holds, what is free, and what training holds, the first to
# go lowest.
BANDS = (
    ("kv", "KV cache: requests, prefixes", "#2f6f8f"),
    ("free", "free", "#e9edf0"),
    ("kept", "kept activations", "#f2cf8d"),
    ("micro_batch", "micro-batch", "#dd9a3c"),
    ("state", "adapter, optimizer", "#a8642a"),
)


def amounts(sample: Sample) -> list[int]:
    """Bytes of each band."""
    held = {"kv": sample.kv, "free": sample.free, **sample.purposes}
    return [held.get(name, 0) for name, _, _ in BANDS]


def svg(samples: Sequence[Sample], waves: Sequence[Span]) -> str:
    """The picture; waves of prompts are marked along the top."""
    end_s = max((s.at_s for s in samples), default=0.0) or 1.0
    total = max((s.total for s in samples), default=0) or 1

    def x(at_s: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * at_s / end_s, 1)

    def y(size: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * size / total, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + 26}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT + 26}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT + 26}" fill="#ffffff"/>',
    ]
    stacks = [amounts(sample) for sample in samples]
    for band, (_, _, colour) in enumerate(BANDS):
        lower = [(x(s.at_s), y(sum(stack[:band]))) for s, stack in zip(samples, stacks, strict=True)]
        upper = [(x(s.at_s), y(sum(stack[: band + 1]))) for s, stack in zip(samples, stacks, strict=True)]
        points = " ".join(f"{px},{py}" for px, py in (*_steps(lower), *reversed(_steps(upper))))
        parts.append(f'<polygon points="{points}" fill="{colour}"/>')
    for wave in waves:
        left, right = x(wave.began_s), x(min(wave.ended_s, end_s))
        parts += [
            f'<rect x="{left}" y="{TOP - 8}" width="{round(right - left, 1)}" height="5" fill="#333333"/>',
            f'<text x="{left}" y="{TOP - 14}">long prompts</text>',
            f'<line x1="{left}" y1="{TOP}" x2="{left}" y2="{HEIGHT - BOTTOM}" stroke="#333333" stroke-dasharray="3 3"/>',
        ]
    return "\n".join([*parts, *_axes(x, y, end_s, total), *_legend(), "</svg>", ""])


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A look holds until the next one that differs: memory moves at once, not along a slope."""
    found = points[:1]
    for px, py in points[1:]:
        if py != found[-1][1]:
            found += [(px, found[-1][1]), (px, py)]
    return [*found, (points[-1][0], found[-1][1])] if points else []


def _axes(x, y, end_s: float, total: int) -> list[str]:
    parts = []
    for quarter in range(5):
        size = total * quarter / 4
        parts.append(f'<text x="{LEFT - 8}" y="{y(size) + 4}" text-anchor="end">{size / MIB:.0f}</text>')
    tick = next(t for t in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600) if end_s / t <= 12 or t == 3600)
    for number in range(int(end_s // tick) + 1):
        at = x(number * tick)
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number * tick}</text>')
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts += [
        f'<text x="{middle}" y="{HEIGHT - BOTTOM + 36}" text-anchor="middle">seconds</text>',
        f'<text x="12" y="{TOP - 14}">MiB</text>',
    ]
    return parts


def _legend() -> list[str]:
    parts, at = [], LEFT
    for _, name, colour in BANDS:
        parts += [
            f'<rect x="{at}" y="{HEIGHT + 6}" width="12" height="12" fill="{colour}" stroke="#999999"/>',
            f'<text x="{at + 17}" y="{HEIGHT + 16}">{escape(name)}</text>',
        ]
        at += 36 + round(6.3 * len(name))
    return parts

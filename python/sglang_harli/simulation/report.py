"""Simulated runs as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_harli.simulation.compare import Row

_WIDE = "{:<24} {:<12} {:>6} {:>7} {:>9} {:>16} {:>6}  {:>6} {:>6} {:>6}  {:>7} {:>6}"


def side_by_side(rows: Sequence[Row], unit: str) -> Iterator[str]:
    """One line per trace and rate model, then what does not hold."""
    yield f"training throughput in {unit}; requests within their target in per cent"
    yield _WIDE.format(
        *("trace", "rate model", "harli", "ladder", "threshold", "best fixed", "limit"),
        *("harli", "ladder", "alone", "/ladder", "/limit"),
    )
    for row in rows:
        ours, ladder, threshold, fixed, alone = row.outcomes
        yield _WIDE.format(
            row.trace[:24],
            row.rate_model,
            f"{ours.rate:.1f}",
            f"{ladder.rate:.1f}",
            f"{threshold.rate:.1f}",
            f"{fixed.rate:.1f} ({fixed.policy.removeprefix('fixed ')})",
            "-" if row.oracle is None else f"{row.oracle.rate:.1f}",
            *(f"{100 * outcome.attainment:.1f}" for outcome in (ours, ladder, alone)),
            f"{row.against_ladder:.3f}",
            "-" if row.against_oracle is None else f"{row.against_oracle:.3f}",
        )
    for row in rows:
        for problem in row.problems:
            yield f"does not hold: {row.trace}, {row.rate_model}: {problem}"


_LONG = "{:<20} {:>9} {:>8} {:>8} {:>8} {:>9} {:>7} {:>9}"


def one_by_one(rows: Sequence[Row], unit: str) -> Iterator[str]:
    """A table per trace and rate model, a line per policy."""
    for row in rows:
        yield f"{row.trace}, {row.rate_model}, mean batch {row.mean_batch:.1f} offered; throughput in {unit}"
        yield _LONG.format("policy", "training", "met %", "p50 ms", "p99 ms", "gap ms", "batch", "switch/s")
        for outcome in row.outcomes:
            yield _LONG.format(
                outcome.policy,
                f"{outcome.rate:.2f}",
                f"{100 * outcome.attainment:.2f}",
                *(
                    f"{1e3 * value:.1f}"
                    for value in (outcome.tpot_p50_s, outcome.tpot_p99_s, outcome.itl_p99_s)
                ),
                f"{outcome.mean_batch:.1f}",
                f"{outcome.switches:.1f}",
            )
        if row.oracle is not None:
            yield f"{'upper limit':<20} {row.oracle.rate:>9.2f}  at {1e3 * row.oracle.tpot_s:.1f} ms per token"
        yield ""

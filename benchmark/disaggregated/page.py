"""The disaggregated benchmark as a page (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from colocate.judge import Row, on_time
from colocate.report import spread, times, verdicts
from disaggregated.plan import HARLI, SERVE


def table(results: dict[str, Any]) -> str:
    lines = [
        "| mode | requests | TPOT mean / p50 / p90 / p99, ms | TTFT (not promised) mean / p50 / p90 / p99, ms "
        "| within target | failed | finetune tokens/s | memory of the decode server, MiB | left out |",
        "|" + "---|" * 9,
    ]
    for mode in (SERVE, HARLI):
        found = [cell for cell in results["cells"] if cell["mode"] == mode]
        counted = [cell for cell in found if cell["disturbed"] is None] or found
        if not counted:
            continue
        flags = [flag for cell in counted for flag in on_time(cell, results["target_ms"])]
        speeds = [cell["tokens_per_s"] for cell in counted if "tokens_per_s" in cell]
        row = [
            mode,
            str(len(flags)),
            times(counted, "tpots_ms"),
            times(counted, "ttfts_ms"),
            f"{statistics.fmean(flags):.1%}",
            str(sum(len(cell["failures"]) for cell in found)),
            spread(speeds) if speeds else "-",
            f"{max(cell['pss_bytes'] for cell in counted) / 2**20:.0f}",
            str(len(found) - len(counted)),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def page(results: dict[str, Any], rows: Sequence[Row], problems: Sequence[str]) -> str:
    found = results["calibration"]
    measured = ", ".join(f"{busy:.0%} at {rate:.2f}" for rate, busy in found["measured"])
    alone = [cell["busy"] for cell in results["cells"] if "busy" in cell]
    parts = [
        table(results),
        f"The serve-only decode server is to be {results['load']}% busy: {found['rate']:.2f} requests/s (calibrated: "
        f"{measured} requests/s); it was {spread([100 * share for share in alone])}%. Target: {results['target_ms']:.1f} ms "
        f"a token, {results['multiple']:g} times serve-only's median of {found['tpot_ms']:.1f} ms.",
        verdicts(rows),
        f"Noise. {results['noise_rule']}.",
        "Nothing fails." if not problems else "\n".join(f"- FAILS: {text}" for text in problems),
    ]
    return "\n\n".join(parts)

"""The soak's verdict and its table (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from survive.chaos import BACK_S
from survive.watch import Life, in_life, over_run

MEMORY_GROWTH = 0.05
FILES_GROWTH = 16
ROLES = ("http", "scheduler", "detokenizer", "service")


def growth(lives: Sequence[Life]) -> list[dict[str, Any]]:
    """Every comparison of memory and files that the lives allow."""
    rows = [{"kind": "in its life", **row} for life in lives if (row := in_life(life)) is not None]
    rows += [{"kind": "over the run", **row} for role in ROLES if (row := over_run(lives, role)) is not None]
    return rows


def verdict(results: dict[str, Any], lives: Sequence[Life], *, judged: bool) -> list[str]:
    """What is wrong, one line each; fills ``results["growth"]``.

    Args:
        judged: whether growth counts (it is reported in any case).
    """
    problems = [f"a request failed: {text}" for text in results["failed_requests"]]
    for name in ("lost", "doubled", "differing", "failed"):
        problems += [f"job {name}: {job}" for job in results["jobs"][name]]
    problems += [f"the service was away for {s} s" for s in results["service_back_s"] if s > BACK_S]
    results["growth"] = growth(lives)
    for row in results["growth"]:
        who = f"{row['role']}, {row['kind']}"
        if judged and row["memory_growth"] > MEMORY_GROWTH:
            problems.append(f"memory of {who}: {row['memory_mb']} MB, {row['memory_growth']:+.1%}")
        if judged and row["files_growth"] > FILES_GROWTH:
            problems.append(f"open files of {who}: {row['files']}")
    saves = results["checkpoints"]
    if saves is not None:
        problems += [f"a request failed beside checkpoints: {text}" for text in saves["errors"]]
        if saves["during"].get("p99", float("inf")) > saves["target_ms"]:
            problems.append(f"p99 gap during a checkpoint: {saves['during']} against {saves['target_ms']} ms")
    return problems


def table(results: dict[str, Any], problems: Sequence[str], *, judged: bool) -> str:
    jobs, kills = results["jobs"], results["kills"]
    rows = [
        ("soak", f"{results['seconds']} s, start included"),
        ("requests", f"{results['requests']}, {results['adapter_requests']} of them to adapters"),
        ("requests failed", len(results["failed_requests"])),
        ("in flight as the server was killed", results["in_flight_when_killed"]),
        ("jobs acknowledged", f"{jobs['acknowledged']}: {_counts(jobs['statuses'])}"),
        ("jobs lost / doubled / differing / failed", " / ".join(str(len(jobs[n])) for n in _FAULTS)),
        (
            "kills",
            f"everything {kills['everything']}, service {kills['service']}, held still {kills['stalls']}",
        ),
        ("service back after a kill, s", _spread(results["service_back_s"])),
        ("service replaced after it was held still, s", _spread(results["stalls_back_s"])),
        ("server back after a kill of everything, s", _spread(results["restarts_s"])),
    ]
    lines = ["| what | found |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    saves = results["checkpoints"]
    if saves is not None:
        for name in ("during", "beside"):
            gaps = saves[name]
            text = ", ".join(f"{k} {v:g}" for k, v in gaps.items())
            where = (
                f"during {saves['checkpoints']} checkpoints of {saves['state_mb']} MB"
                if name == "during"
                else "training, between checkpoints"
            )
            lines.append(f"| gap between tokens, ms, {where} (target {saves['target_ms']:g}) | {text} |")
    lines += ["", "| process | judged | memory, MB | growth | open files |", "|---|---|---|---|---|"]
    for row in results["growth"]:
        span = f"{row['kind']} ({row.get('lived_s') or row.get('age_s'):g} s)"
        memory = " to ".join(f"{m:g}" for m in row["memory_mb"])
        files = " to ".join(f"{f:g}" for f in row["files"])
        lines.append(f"| {row['role']} | {span} | {memory} | {row['memory_growth']:+.1%} | {files} |")
    lines += ["", "Growth counts." if judged else "Growth is reported, not judged: the run is too short."]
    lines.append(f"Verdict: {'clean' if not problems else f'{len(problems)} problems'}.")
    return "\n".join(lines)


_FAULTS = ("lost", "doubled", "differing", "failed")


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(found.items()))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{min(values):g} to {max(values):g} ({len(values)} times)"

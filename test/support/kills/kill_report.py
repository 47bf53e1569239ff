"""What the kill tests tried and what came of it: at the end of the tests' output, and as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.kills.kill_cases import KINDS, Outcome

OUTCOMES = pytest.StashKey[list[Outcome]]()


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("kills", "kills at named points (test/e2e/test_kill.py)")
    group.addoption(
        "--points",
        default="",
        metavar="all|POINT[,POINT]",
        help="every named point with every victim, or these points, instead of a sample",
    )
    group.addoption("--points-report", metavar="FILE", help="write what was tried and its outcome as JSON")


def totals(outcomes: list[Outcome]) -> dict[str, int]:
    """Cases with a problem, by kind."""
    return {kind: sum(kind in outcome.problems for outcome in outcomes) for kind in KINDS}


def write_summary(reporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash.get(OUTCOMES, [])
    if not outcomes:
        return
    reporter.section("kills at named points")
    for outcome in outcomes:
        words = "; ".join(f"{kind}: {text}" for kind, texts in outcome.problems.items() for text in texts)
        attempts = f"{outcome.attempts} attempt{'s' * (outcome.attempts != 1)}"
        where = f"{outcome.host:6} {outcome.case!s:34}"
        reporter.line(f"{where} {outcome.seconds:5.1f} s  {attempts:10}  {words or 'as uninterrupted'}")
    sums = totals(outcomes)
    reporter.line(f"{len(outcomes)} kills, " + ", ".join(f"{kind} {count}" for kind, count in sums.items()))
    path = config.getoption("--points-report")
    if path:
        Path(path).write_text(json.dumps(_report(outcomes), indent=1) + "\n")


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "kills": len(outcomes),
        **totals(outcomes),
        "cases": [
            {
                "host": outcome.host,
                "point": outcome.case.point,
                "victim": outcome.case.victim,
                "reach": outcome.case.reach,
                "final_checkpoint_only": outcome.case.final,
                "seconds": round(outcome.seconds, 2),
                "attempts": outcome.attempts,
                "problems": outcome.problems,
            }
            for outcome in outcomes
        ],
    }

"""The figures of the HTTP API under clients that watch, and when its benchmark fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

import bench_http_api as bench


def results(**changes: Any) -> dict[str, Any]:
    quick = [0.001 * number for number in range(1, 101)]
    return {"seconds": dict.fromkeys(bench.KINDS, quick), "failed": [], "late": 0} | changes


def test_percentiles_in_milliseconds() -> None:
    found = bench.figures(results())["list"]
    assert found == {"answers": 100, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert "| list | 100 | 50.0 | 95.0 | 99.0 |" in bench.table(results())
    assert bench.failures(results()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": {"list": [0.1], "status": [0.01], "events": [0.01]}}, "list: p95 is 100.0 ms"),
        ({"seconds": {"list": [0.01], "status": [], "events": [0.01]}}, "status: no answers"),
        ({"failed": ["list: 500"]}, "1 requests failed"),
    ],
)
def test_what_is_not_accepted(changes: dict[str, Any], said: str) -> None:
    (text,) = bench.failures(results(**changes))
    assert text.startswith(said)
    assert bench.table(results(**changes))


def test_slow_events_are_shown_and_not_judged() -> None:
    assert bench.failures(results(seconds={"list": [0.01], "status": [0.01], "events": [5.0]})) == []

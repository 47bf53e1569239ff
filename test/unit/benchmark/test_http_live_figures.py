"""The figures of serving beside clients of the HTTP API, and when their benchmark fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

import bench_http_live as bench
from http_api import upload


def phase(beside: Any = None, **changes: Any) -> dict[str, Any]:
    streams = {"gaps": [0.02] * 99 + [0.3], "tpots": [0.03] * 10, "failed": []}
    did = {"steps": 9, "evaluations": 2, "grew_mib": 3.0}
    return {"streams": streams, "beside": beside, "seconds": 60.0} | did | changes


def results(**changes: Any) -> dict[str, Any]:
    watched = {"seconds": {kind: [0.01] for kind in bench.KINDS}, "failed": [], "late": 0}
    sent = {"seconds": 8.0, "bytes": 64 << 20, "sha256": ""}
    phases = {"alone": phase(), "watched": phase(watched), "upload": phase(sent)}
    return {"target_ms": 50.0, "gap_ms": 100.0, **phases} | changes


def test_figures_by_phase() -> None:
    found = bench.figures(results())["upload"]
    assert (found["requests"], found["on_time"], found["gap_p50"], found["gap_p99"]) == (10, 1.0, 20.0, 20.0)
    assert found["gap_max"] == 300.0
    assert "| upload | 10 | 100.0% | 20.0 | 20.0 | 300.0 | 9 | 2 | 3.0 |" in bench.table(results())
    assert "64 MiB in 8.0 s (8 MiB/s)" in bench.table(results())
    assert bench.failures(results()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "upload: the job stands still"),
        ({"steps": 30, "evaluations": 0}, "upload: the job stands still, 30 steps, 0 evaluations"),
        ({"grew_mib": 64.0}, "upload: the HTTP process grew by 64 MiB"),
        ({"streams": {"gaps": [0.02], "tpots": [0.03, 0.06], "failed": []}}, "upload: 50.0% of requests"),
        ({"streams": {"gaps": [0.11], "tpots": [0.03], "failed": []}}, "upload: the p99 gap between tokens"),
        (
            {"streams": {"gaps": [0.02], "tpots": [0.03], "failed": ["x"]}},
            "upload: 1 requests for tokens failed",
        ),
    ],
)
def test_what_is_not_accepted(changes: dict[str, Any], said: str) -> None:
    sent = results()["upload"]["beside"]
    (text,) = bench.failures(results(upload=phase(sent, **changes)))
    assert text.startswith(said)


def test_no_request_at_all_is_not_accepted() -> None:
    silent = phase(streams={"gaps": [], "tpots": [], "failed": []})
    (text,) = bench.failures(results(alone=silent))
    assert text.startswith("alone: 0.0% of requests")


def test_the_file_that_is_sent_is_rows() -> None:
    piece = next(upload.pieces(1))
    assert len(piece) == 1 << 20
    assert {line.strip() for line in piece.splitlines()} == {upload.LINE.strip(), b""}

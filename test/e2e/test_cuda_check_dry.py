"""The check for the day a GPU is there, tried without one: its servers, on the CPU engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.project_files import ROOT

pytestmark = pytest.mark.long


def test_the_part_with_two_servers_runs_dry(tmp_path: Path):
    """Part 4 has the same servers and twice the time."""
    command = [sys.executable, str(ROOT / "benchmark" / "gpu_check.py"), "--dry", "--part", "3"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (page,) = tmp_path.glob("gpu-check-3_dry_*.json")
    results = json.loads(page.read_text())["results"]
    sections = {"start", "decode", "prefill", "co_serving", "greedy", "adapter"}
    assert set(results["sections"]) == sections and not results["missing"]
    assert page.with_suffix(".md").read_text().startswith("# DRY RUN")
    (log,) = tmp_path.glob("gpu-check-3-ours.log")
    assert "harli: training was warmed up in" in log.read_text(errors="replace")
    served = results["sections"]["co_serving"]
    assert served["status"]["pool"]["backing"] == "host" and served["together"]["requests"] > 0
    assert {"decode", "forward", "backward"} <= {row["phase"] for row in served["status"]["prediction"]}
    assert results["sections"]["greedy"] == {"during": True, "after": True}

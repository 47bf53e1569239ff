"""The check for the day a GPU is there, tried without one: its servers, on the CPU engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.project_files import ROOT

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("part", "sections"),
    [
        (3, {"start", "decode", "prefill", "co_serving", "greedy", "adapter"}),
        (4, {"start", "training alone", "rate 0.5", "predictor"}),
    ],
)
def test_a_part_with_servers_runs_dry(part: int, sections: set[str], tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmark" / "gpu_check.py"), "--dry", "--part", str(part)]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (page,) = tmp_path.glob(f"gpu-check-{part}_dry_*.json")
    results = json.loads(page.read_text())["results"]
    assert set(results["sections"]) == sections and not results["missing"]
    assert page.with_suffix(".md").read_text().startswith("# DRY RUN")
    (log,) = tmp_path.glob(f"gpu-check-{part}-ours.log")
    assert "harli: training was warmed up in" in log.read_text(errors="replace")
    served = results["sections"]["co_serving" if part == 3 else "rate 0.5"]
    assert served["status"]["pool"]["backing"] == "host" and served["together"]["requests"] > 0
    assert {"decode", "forward", "backward"} <= {row["phase"] for row in served["status"]["prediction"]}
    if part == 3:
        assert results["sections"]["greedy"] == {"during": True, "after": True}

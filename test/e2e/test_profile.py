"""Latency profiles on real servers: measured at start-up, and read by the server that
`harli profile` starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.models import make_model
from support.server import start_server

pytestmark = pytest.mark.long

FLAGS = ("--max-running-requests", "2", "--context-length", "160", "--max-total-tokens", "512")
COMMAND_S = 400.0


def test_profiles_of_a_start_and_of_the_command_go_together(tmp_path: Path) -> None:
    model, runs = make_model(tmp_path / "model"), tmp_path / "runs"
    with start_server(model, *FLAGS, "--harli-profile-budget-s", "120", run_dir=runs) as server:
        log = server.log()
    table = runs / "latency-profile.json"
    first = json.loads(table.read_text())
    assert first["decode"] and f"latency profile {table}" in log
    assert {point["batch"] for point in first["decode"]} == {1, 2}
    command = [sys.executable, "-m", "sglang_harli.cli", "profile", "--model-path", model]
    command += ["--run-dir", str(runs), "--json", "--device", "cpu", *FLAGS]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_S, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    # The key of both is the same, and nothing is left for the second to measure.
    assert (made["path"], made["measured"], made["missing"]) == (str(table), 0, 0)
    assert made["points"] >= len(first["decode"])

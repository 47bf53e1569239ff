"""`harli doctor`, all of it, on the installed SGLang (in a process of its own): its seams hold and
its hooks can be applied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harli.tools.server_process import free_port


@pytest.mark.long  # imports the whole of SGLang, as the start of a server does
def test_all_checks(tmp_path: Path):
    place = ["--run-dir", str(tmp_path / "runs"), "--port", str(free_port())]
    command = [sys.executable, "-m", "sglang_harli.cli", "doctor", "--json", *place]
    done = subprocess.run(
        [*command, "--endpoint", f"tcp://127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    report = json.loads(done.stdout)
    assert report["ok"] and done.returncode == 0, report
    found = {check["name"]: check for check in report["checks"]}
    assert found["seams"]["status"] == found["hooks"]["status"] == "ok"
    assert "seams hold" in found["seams"]["found"]
    assert "hooks can be applied" in found["hooks"]["found"]

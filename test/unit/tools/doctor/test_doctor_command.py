"""`harli doctor` as a command: its JSON, its lines and its exit codes, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.tools.doctor import examine
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.finding import Status
from sglang_harli.tools.server_process import free_port

SLOW = ("seams", "hooks")  # test_doctor_on_sglang.py


def harli(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_harli.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def own(tmp_path: Path) -> list[str]:
    """A server that is not there, apart from any that may run here."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    return ["--run-dir", str(tmp_path / "runs"), "--port", str(free_port()), "--endpoint", endpoint]


def test_this_machine_is_well(tmp_path: Path):
    names = [name for name in examine.CHECKS if name not in SLOW]
    only = [word for name in names for word in ("--only", name)]
    done = harli("doctor", "--json", *own(tmp_path), *only)
    report = json.loads(done.stdout)
    assert [c for c in report["checks"] if c["status"] == "problem"] == [], done.stderr
    assert done.returncode == 0
    assert report.keys() == {"version", "ok", "asked", "checks"}
    assert (report["version"], report["ok"]) == (1, True)
    assert report["asked"]["run_dir"] == str(tmp_path / "runs")
    assert [c["name"] for c in report["checks"]] == names
    for check in report["checks"]:
        assert check.keys() == {"name", "status", "found", "mend"}
        assert check["status"] in ("ok", "warning", "problem", "skipped")
        assert check["found"] and bool(check["mend"]) == (check["status"] != "ok")
    assert list(tmp_path.iterdir()) == [], "a look makes nothing"


def test_lines_and_exit_codes(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    done = harli("doctor", *own(tmp_path), "--only", "run-dir", "--only", "cores")
    assert done.returncode == 1
    first, mend, second, summary = done.stdout.splitlines()
    assert first.startswith("[problem]") and "run-dir:" in first
    assert mend.strip() == "mend: give another --harli-run-dir"
    assert "cores:" in second
    assert summary.startswith("2 checks: 1 problem")
    unknown = harli("doctor", "--only", "weather")
    assert unknown.returncode == 2 and "finetune-endpoint" in unknown.stderr
    assert harli("doctor", "--port", "x").returncode == 2
    assert harli("doctor", "--port", "70000").returncode == 2
    assert harli("doctor", "--http", "nowhere", "--json").returncode == 2


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(examine.CHECKS, "python", "installation:no_such_function")
    broken, fine = examine.examine(Asked(), ["python", "cores"])
    assert broken.finding.status is Status.PROBLEM
    assert "the check itself failed: AttributeError" in broken.finding.found
    assert fine.finding.status is not Status.PROBLEM
    assert not examine.healthy([broken, fine])


def test_checks_are_chosen_in_their_order():
    assert examine.chosen([]) == list(examine.CHECKS)
    assert examine.chosen(["cores", "python"]) == ["python", "cores"]
    left_out = set(examine.CHECKS) - set(examine.chosen(quick=True))
    assert left_out == {"device", "seams", "hooks"}
    assert examine.chosen(["seams"], quick=True) == ["seams"]
    with pytest.raises(ConfigError, match="--only weather is not accepted: give one of python, "):
        examine.chosen(["weather"])

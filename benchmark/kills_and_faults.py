"""Is anything lost, doubled or different when a process is killed at a named point, or a write is
refused?

    python benchmark/kills_and_faults.py [--skip-faults | --skip-kills]

Runs ``pytest test/e2e/test_kill.py --points all`` (every named point with every victim on a bare
host, six of them on a real server) and the tests of faults, and writes what they tried.  Exits with
1 when one fails, or when the kills take more than 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from common import report as bench_report

ROOT = Path(__file__).resolve().parents[1]
KILLS = "test/e2e/test_kill.py"
FAULTS = (
    *("test/unit/service/test_faults.py", "test/unit/service/publish/test_publication_faults.py"),
    *("test/unit/service/test_service_crashes.py", "test/unit/service/run/test_clock.py"),
    *("test/unit/service/checkpoint/test_checkpoints.py", "test/unit/service/run/test_run_preparation.py"),
)
LIMIT_S = 15 * 60.0
TOTALS = ("lost", "doubled", "differing", "unclean")
VICTIMS = ("service", "scheduler", "all")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kills at named points, and refused writes.")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--skip-faults", action="store_true", help="only the kills")
    one.add_argument("--skip-kills", action="store_true", help="only the faults; the page keeps its kills")
    parser.add_argument(
        "--results", type=Path, default=bench_report.RESULTS, help="folder of the result files"
    )
    return parser.parse_args(argv)


def run_kills(folder: Path) -> dict[str, Any]:
    report = folder / "kills.json"
    began = time.monotonic()
    code = _pytest(KILLS, "--points", "all", "--points-report", str(report))
    found = json.loads(report.read_text()) if report.exists() else {"kills": 0, "cases": []}
    return {**found, "exit_code": code, "seconds": round(time.monotonic() - began)}


def last_kills(results: Path) -> dict[str, Any]:
    """The kills of the newest result file there."""
    files = sorted(results.glob("kills_and_faults_cpu_*.json"))
    if not files:
        raise SystemExit(
            f"--skip-kills: no kills_and_faults_cpu_*.json in {results}: run it without the option"
        )
    return json.loads(files[-1].read_text())["results"]["kills"]


def run_faults(folder: Path) -> dict[str, Any]:
    report = folder / "faults.xml"
    code = _pytest(*FAULTS, "--junit-xml", str(report))
    return {"exit_code": code, **counted(report.read_text())}


def counted(junit: str) -> dict[str, Any]:
    """Tests by file, and those that did not pass (pure)."""
    tried: Counter[str] = Counter()
    bad: list[str] = []
    for case in ET.fromstring(junit).iter("testcase"):
        parts = case.get("classname", "").split(".")
        tried[next(p for p in reversed(parts) if p.startswith("test_"))] += 1
        if any(child.tag in ("failure", "error") for child in case):
            bad.append(case.get("name", ""))
    return {"tried": dict(tried), "not_passed": bad}


def _pytest(*args: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *args], cwd=ROOT, check=False).returncode


def table(kills: dict[str, Any], faults: dict[str, Any] | None) -> str:
    """Cases tried by point and victim, and the totals (pure)."""
    tried = Counter((case["host"], case["point"], case["victim"]) for case in kills["cases"])
    points = list(dict.fromkeys(case["point"] for case in kills["cases"]))
    lines = [
        "| point | " + " | ".join(f"{v} killed" for v in VICTIMS) + " | on a real server |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        bare = [str(tried["bare", point, victim]) for victim in VICTIMS]
        server = [v for v in VICTIMS if tried["server", point, v]]
        lines.append(f"| {point} | {' | '.join(bare)} | {', '.join(server) or '-'} |")
    lines += ["", f"{kills['kills']} kills in {kills['seconds']} s: " + _totals(kills) + "."]
    if faults is not None:
        lines += ["", "| faults (tests) | tried |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in faults["tried"].items()]
        lines += ["", f"Not passed: {len(faults['not_passed'])}."]
    return "\n".join(lines)


def _totals(kills: dict[str, Any]) -> str:
    return ", ".join(f"{name} {kills.get(name, 'unknown')}" for name in TOTALS)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="harli-kills-") as name:
        kills = last_kills(options.results) if options.skip_kills else run_kills(Path(name))
        faults = None if options.skip_faults else run_faults(Path(name))
    text = table(kills, faults)
    bench_report.write(
        "kills_and_faults",
        "cpu",
        question="Is anything lost, doubled or different when a process is killed at a named point, or a write refused?",
        settings={
            "split": "--harli-quantum-rows 1: weights are compared bit for bit with an uninterrupted run",
            "bare host": "the real service, link, trainer, loader and publisher around SGLang's model runner",
        },
        results={"kills": kills, "faults": faults},
        table=text,
        not_shown="A power cut (kill -9 leaves the operating system's page cache), and a GPU.",
        folder=options.results,
    )
    print(text)
    bad = kills["exit_code"] or kills["seconds"] > LIMIT_S or (faults is not None and faults["exit_code"])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Does our server start as fast as plain SGLang with the same limits, and how much memory does it
take?

    python benchmark/bench_start.py [--model DIR] [--launches 3]

Launches alternate (plain, ours, plain, ours, ...) after one discarded launch of each; times are
medians, from the command to the first 200 of /health_generate.  Memory is the proportional set size
(PSS) of all processes of the server, the finetune service included.  Exits with 1 above 1.2 times
plain SGLang's time, or at 5 GB and more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import report, servers

MAX_RATIO = 1.2
MAX_PSS_BYTES = 5_000_000_000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start-up time and memory against plain SGLang.")
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny Llama, made for this run)")
    parser.add_argument("--launches", type=int, default=3, help="measured launches of each side (default: 3)")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


def measure(name: str, server: servers.Server) -> dict[str, float]:
    """Wait for a server that has just been started, measure it and end it."""
    with servers.ended(server):
        measured = {"start_s": round(server.wait_ready(), 2), "pss_bytes": server.pss_bytes()}
    print(f"{name}: {measured['start_s']:.1f} s, {measured['pss_bytes'] / 1e9:.2f} GB", flush=True)
    return measured


def run(model: Path, folder: Path, launches: int) -> dict[str, Any]:
    first = servers.ours(model)
    with servers.ended(first):
        first.wait_ready()
        limits = servers.limits_of(first)
    flags = servers.flags_for(limits, lora=True)
    print("same limits for plain SGLang: " + " ".join(flags), flush=True)
    measure("plain, discarded", servers.plain_with_lora(model, flags, folder / "baseline"))
    sides: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    for _ in range(launches):
        sides["plain"].append(measure("plain", servers.plain_with_lora(model, flags, folder / "baseline")))
        sides["ours"].append(measure("ours", servers.ours(model)))
    medians = {side: statistics.median(r["start_s"] for r in rows) for side, rows in sides.items()}
    return {
        "launches": sides,
        "median_start_s": medians,
        "ratio": round(medians["ours"] / medians["plain"], 4),
        "max_pss_bytes": max(r["pss_bytes"] for r in sides["ours"]),
        "limits": limits,
    }


def table(results: dict[str, Any]) -> str:
    rows = ["| | start, s (each launch) | median, s | PSS, GB (largest) |", "|---|---|---|---|"]
    for side, runs in results["launches"].items():
        times = ", ".join(f"{r['start_s']:.1f}" for r in runs)
        pss = max(r["pss_bytes"] for r in runs) / 1e9
        rows.append(f"| {side} | {times} | {results['median_start_s'][side]:.1f} | {pss:.2f} |")
    return "\n".join([*rows, "", f"Ratio of the medians: {results['ratio']:.3f} (at most {MAX_RATIO})."])


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="harli-bench-") as name:
        folder = Path(name)
        model = options.model
        if model is None:
            from sglang_harli.tools.make_model import make_model

            model = folder / "model"
            make_model(model, "llama", size="tiny", seconds=0)
        results = run(model.resolve(), folder, options.launches)
    page = report.write(
        "start",
        "cpu",
        question="Does our server start as fast as plain SGLang with the same limits and LoRA flags?",
        settings={"model": options.model or "Llama, 256 wide, 4 layers, fp32", "launches": options.launches},
        results=results,
        table=table(results),
        not_shown=(
            "How long a large model takes: loading its weights is the same on both sides and would hide the "
            "difference. Plain SGLang does not start with LoRA flags on a CPU at all; the baseline carries the "
            "patch for that and nothing else of ours."
        ),
        folder=options.results,
    )
    print(table(results))
    print(f"written: {page}")
    slow = results["ratio"] > MAX_RATIO
    large = results["max_pss_bytes"] >= MAX_PSS_BYTES
    if slow:
        print(f"FAIL: {results['ratio']:.3f} times plain SGLang's start, at most {MAX_RATIO} is accepted")
    if large:
        print(
            f"FAIL: {results['max_pss_bytes'] / 1e9:.2f} GB, less than {MAX_PSS_BYTES / 1e9:.0f} is accepted"
        )
    return 1 if slow or large else 0


if __name__ == "__main__":
    sys.exit(main())

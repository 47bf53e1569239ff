"""Do requests stay on time, and lists of jobs fast, while clients watch a full queue, a job trains
and a large file is sent?

    python benchmark/bench_http_live.py [--jobs 1000] [--events 100000] [--clients 50] [--mib 1024]

A real server on a run directory with queued jobs and their events, the first of which trains and is
evaluated every 5 steps; streams of requests all the time.  Three phases: nothing else; clients that
each ask for a page of jobs, one job and its events every two seconds; a file sent over HTTP.
Clients and sender are niced.  Exits with 1 where less than 99% of requests keep the TPOT target,
the 99th percentile of the gaps between tokens is above theirs while the file is sent, the 95th
percentile of lists or of states is 100 ms or more, the HTTP process grows by 64 MiB or more, the
job stands still in a phase, or a request fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import bench_http_api
from common import modules, report, servers
from common.load import attainment, percentile
from http_api import stock
from http_api.clients import KINDS
from sglang_harli.client.blocking_client import FinetuneClient

ON_TIME = 0.99  # of the requests
MAX_GROWTH_MIB = 64
MIB = 1 << 20
PHASES = ("alone", "watched", "upload")
PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB = 32, 64, 1024
# The first job outlasts the phases, and evaluates the rows that are held out all the time.
JOB = {"n_epochs": 10_000, "validation_split": 0.5, "eval_steps": 5}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serving beside clients of the HTTP API and a job.")
    parser.add_argument("--jobs", type=int, default=1000, help="queued jobs (default: 1000)")
    parser.add_argument("--events", type=int, default=100_000, help="of all jobs together (default: 100000)")
    parser.add_argument("--clients", type=int, default=50, help="that watch (default: 50)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds from round to round (default: 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the first two phases (default: 60)")
    parser.add_argument("--mib", type=int, default=1024, help="of the file that is sent (default: 1024)")
    parser.add_argument("--streams", type=int, default=2, help="of requests (default: 2)")
    parser.add_argument(
        "--target", type=float, default=50.0, help="the server's TPOT target, ms (default: 50)"
    )
    parser.add_argument("--gap", type=float, default=100.0, help="its target for gaps, ms (default: 100)")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


# ------------------------------------------------------------------ processes
def module(name: str, *arguments: object, **more: Any) -> subprocess.Popen[str]:
    command = [*modules.command(name), *(str(argument) for argument in arguments)]
    env = modules.found_in(dict(os.environ))
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **more)


def answered(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it printed; its stdin is closed."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return json.loads(out)


class Growth:
    """The largest resident memory of a process while it is watched, over that at the beginning."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._first = self._most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._most = max(self._most, self._process.memory_info().rss)

    def mib(self) -> float:
        self._done.set()
        self._thread.join()
        return (self._most - self._first) / MIB


class Run:
    """The phases on a server that is up."""

    def __init__(self, server: servers.Server, options: argparse.Namespace) -> None:
        self._server, self._options = server, options
        self._url = server.url

    def phase(self, name: str) -> dict[str, Any]:
        growth, before = Growth(self._server.pid), self._trained()
        arguments = (self._url, self._options.streams, PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB)
        streams = module("http_api.streams", *arguments, stdin=subprocess.PIPE)
        time.sleep(2.0)  # the first requests are under way
        began = time.perf_counter()
        beside = self._beside(name)
        seconds = time.perf_counter() - began
        found = {"streams": answered(streams), "beside": beside, "seconds": seconds}
        did = {key: value - before[key] for key, value in self._trained().items()}
        return found | did | {"grew_mib": growth.mib()}

    def _beside(self, name: str) -> dict[str, Any] | None:
        options = self._options
        if name == "alone":
            time.sleep(options.seconds)
            return None
        if name == "watched":
            watch = (self._url, options.clients, options.every, options.seconds)
            return answered(module("http_api.clients", *watch))
        return answered(module("http_api.upload", self._url, options.mib))

    def _trained(self) -> dict[str, int]:
        """Steps and evaluations of all jobs that have begun."""
        with FinetuneClient(self._server.endpoint) as client:
            jobs = [job for job in client.list(limit=1000) if job.started_at is not None]
        evaluated = sum(job.evaluation["step"] for job in jobs if job.evaluation)
        return {"steps": sum(job.step for job in jobs), "evaluations": evaluated // JOB["eval_steps"]}

    def wait_trains(self) -> None:
        end = time.monotonic() + 300
        while self._trained()["evaluations"] < 1:
            if time.monotonic() > end:
                raise SystemExit(f"no job trains after 300 s:\n{self._server.log()[-4000:]}")
            time.sleep(0.5)


@contextlib.contextmanager
def served(folder: Path, options: argparse.Namespace) -> Iterator[servers.Server]:
    """The server on a stocked run directory, with a job that trains."""
    from sglang_harli.tools.make_model import make_model

    model, run_dir = folder / "model", folder / "runs"
    make_model(model, "llama", size="tiny", seconds=0)
    with (
        bench_http_api.service(run_dir, model) as endpoint,
        bench_http_api.served(endpoint) as url,
    ):
        stock.submit(url, bench_http_api.MODEL, options.jobs, **JOB)
    events = stock.add_events(run_dir, options.events)
    print(f"{options.jobs} jobs are queued, with {events} events", flush=True)
    flags = ("--served-model-name", bench_http_api.MODEL, "--harli-run-dir", str(run_dir))
    targets = ("--harli-tpot-slo-ms", f"{options.target:g}", "--harli-max-itl-ms", f"{options.gap:g}")
    server = servers.ours(model, *flags, *targets)
    with servers.ended(server):
        server.wait_ready()
        yield server


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with served(folder, options) as server:
        measured = Run(server, options)
        measured.wait_trains()
        results: dict[str, Any] = {"target_ms": options.target, "gap_ms": options.gap}
        for name in PHASES:
            results[name] = measured.phase(name)
            print(f"{name}: {results[name]['seconds']:.0f} s", flush=True)
        return results


# ------------------------------------------------------------------ figures
def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By phase: gaps in milliseconds, the share of requests on time, steps and growth."""
    found = {}
    for name in PHASES:
        phase = results[name]
        gaps = sorted(1e3 * gap for gap in phase["streams"]["gaps"])
        tpots = [1e3 * tpot for tpot in phase["streams"]["tpots"]]
        found[name] = {
            "requests": len(tpots),
            "on_time": attainment(tpots, results["target_ms"]) if tpots else 0.0,
            **{f"gap_p{p}": percentile(gaps, p) if gaps else float("inf") for p in (50, 99)},
            "gap_max": gaps[-1] if gaps else float("inf"),
            "steps": phase["steps"],
            "evaluations": phase["evaluations"],
            "grew_mib": phase["grew_mib"],
        }
    return found


def failures(results: dict[str, Any]) -> list[str]:
    """What is not accepted, in sentences."""
    said, target = [], results["target_ms"]
    for name, found in figures(results).items():
        if found["on_time"] < ON_TIME:
            said.append(
                f"{name}: {found['on_time']:.1%} of requests keep {target:g} ms, {ON_TIME:.0%} is accepted"
            )
        if found["steps"] <= 0 or (found["steps"] > 2 * JOB["eval_steps"] and found["evaluations"] <= 0):
            said.append(
                f"{name}: the job stands still, {found['steps']} steps, {found['evaluations']} evaluations"
            )
        if found["grew_mib"] >= MAX_GROWTH_MIB:
            said.append(f"{name}: the HTTP process grew by {found['grew_mib']:.0f} MiB")
        failed = results[name]["streams"]["failed"]
        if failed:
            said.append(f"{name}: {len(failed)} requests for tokens failed, the first: {failed[0]}")
    gap = figures(results)["upload"]["gap_p99"]
    if gap > results["gap_ms"]:
        said.append(f"upload: the p99 gap between tokens is {gap:.1f} ms, {results['gap_ms']:g} is accepted")
    return said + [f"watched: {text}" for text in bench_http_api.failures(results["watched"]["beside"])]


def table(results: dict[str, Any]) -> str:
    rows = [
        "| | requests | on time | gap p50, ms | gap p99, ms | longest, ms | steps trained | evaluations | HTTP process grew, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures(results).items():
        gaps = " | ".join(f"{found[key]:.1f}" for key in ("gap_p50", "gap_p99", "gap_max"))
        rows.append(
            f"| {name} | {found['requests']} | {found['on_time']:.1%} | {gaps} | {found['steps']} | {found['evaluations']} | {found['grew_mib']:.1f} |"
        )
    sent = results["upload"]["beside"]
    rate = sent["bytes"] / MIB / sent["seconds"]
    return "\n".join(
        [
            *rows,
            "",
            f"On time: a mean time per output token within {results['target_ms']:g} ms; gaps are to be "
            f"within {results['gap_ms']:g} ms. The file: "
            f"{sent['bytes'] / MIB:.0f} MiB in {sent['seconds']:.1f} s ({rate:.0f} MiB/s).",
            "",
            "Clients that watch:",
            "",
            bench_http_api.table(results["watched"]["beside"]),
        ]
    )


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="harli-bench-") as name:
        results = run(Path(name), options)
    page = report.write(
        "http-live",
        "cpu",
        question=(
            "Do requests stay on time, and lists of jobs fast, while clients watch a full queue, a job trains and a "
            "large file is sent?"
        ),
        settings={
            "model": "Llama, tiny, random weights",
            "jobs": f"{options.jobs}, one trains, the rest queued",
            "job": ", ".join(f"{name} {value}" for name, value in JOB.items()),
            "events": options.events,
            "requests": f"{options.streams} streams, {PROMPT_TOKENS} prompt tokens, {OUTPUT_TOKENS} output",
            "clients": f"{options.clients}, each a page of 20 jobs, one job, 20 of its events every {options.every:g} s",
            "file": f"{options.mib} MiB, one request",
        },
        results={"figures": figures(results), "watched": bench_http_api.figures(results["watched"]["beside"])}
        | {"upload": results["upload"]["beside"], "target_ms": options.target, "gap_ms": options.gap},
        table=table(results),
        not_shown=(
            "What a larger model, a GPU or more requests would do. The niced clients and sender share the cores "
            f"({KINDS[0]} and {KINDS[1]} hold their waiting for one)."
        ),
        folder=options.results,
    )
    print(table(results))
    print(f"written: {page}")
    said = failures(results)
    for text in said:
        print(f"FAIL: {text}")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())

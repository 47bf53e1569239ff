"""Do lists and states of jobs come fast over HTTP while many clients watch a full queue?

    python benchmark/bench_http_api.py [--jobs 1000] [--events 100000] [--clients 50] [--seconds 60]

The real service on a run directory with queued jobs and their events, and the routes in a process
of their own; each client asks for a page of jobs, one job and its events every two seconds.  The
clients are one process, niced.  Exits with 1 where the 95th percentile of lists or of states is
100 ms or more, or a request failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import modules, report
from common.load import percentile
from http_api import stock
from http_api.clients import KINDS
from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig

MAX_P95_MS = 100.0
JUDGED = ("list", "status")
PERCENTS = (50, 95, 99)
MODEL = "bench"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency of lists and states of jobs over HTTP.")
    parser.add_argument("--jobs", type=int, default=1000, help="queued jobs (default: 1000)")
    parser.add_argument("--events", type=int, default=100_000, help="of all jobs together (default: 100000)")
    parser.add_argument("--clients", type=int, default=50, help="that watch (default: 50)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds from round to round (default: 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of watching (default: 60)")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


# ------------------------------------------------------------------ processes
@contextlib.contextmanager
def service(run_dir: Path, model: Path) -> Iterator[str]:
    """The service until it has ended; its inner endpoint."""
    endpoint = f"ipc://{run_dir.parent}/public.sock"
    config = ServiceConfig(
        options=HarliOptions(finetune_endpoint=endpoint, run_dir=str(run_dir)),
        model_path=str(model),
        tokenizer_path=str(model),
        served_model_name=MODEL,
    )
    command = [sys.executable, "-m", "sglang_harli.service.app"]
    with (
        (run_dir.parent / "service.log").open("ab") as log,
        subprocess.Popen(command, env={**os.environ, SERVICE_ENV: config.to_json()}, stderr=log) as process,
    ):
        try:
            with FinetuneClient(endpoint) as client:
                client.status()
            yield run_paths.verbs_endpoint(str(run_dir))
        finally:
            process.terminate()
            process.wait()
            for left in (run_paths.ipc_dir(str(run_dir)), run_paths.shm_dir(str(run_dir))):
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def served(endpoint: str) -> Iterator[str]:
    """The routes; their URL."""
    command = [*modules.command("http_api.serve"), endpoint]
    env = modules.found_in(dict(os.environ))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


def watch(url: str, options: argparse.Namespace) -> dict[str, Any]:
    command = modules.command("http_api.clients")
    command += [url, *(str(value) for value in (options.clients, options.every, options.seconds))]
    env = modules.found_in(dict(os.environ))
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from sglang_harli.tools.make_model import make_model

    model, run_dir = folder / "model", folder / "runs"
    make_model(model, "llama", size="tiny", seconds=0)
    with service(run_dir, model) as endpoint, served(endpoint) as url:
        stock.submit(url, MODEL, options.jobs)
    print(f"{options.jobs} jobs are queued", flush=True)
    events = stock.add_events(run_dir, options.events)
    print(f"{events} events are written; {options.clients} clients watch", flush=True)
    with service(run_dir, model) as endpoint, served(endpoint) as url:
        return {"events": events, **watch(url, options)}


# ------------------------------------------------------------------ figures
def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds by kind and percentile, with the number of answers."""
    found: dict[str, dict[str, float]] = {}
    for kind, seconds in results["seconds"].items():
        ordered = sorted(seconds)
        found[kind] = {"answers": len(ordered)}
        if ordered:
            found[kind] |= {f"p{p}": round(1000 * percentile(ordered, p), 2) for p in PERCENTS}
    return found


def failures(results: dict[str, Any]) -> list[str]:
    """What is not accepted, in sentences."""
    said = []
    for kind in JUDGED:
        p95 = figures(results)[kind].get("p95")
        if p95 is None:
            said.append(f"{kind}: no answers")
        elif p95 >= MAX_P95_MS:
            said.append(f"{kind}: p95 is {p95:.1f} ms, below {MAX_P95_MS:g} is accepted")
    if results["failed"]:
        said.append(f"{len(results['failed'])} requests failed, the first: {results['failed'][0]}")
    return said


def table(results: dict[str, Any]) -> str:
    rows = ["| | answers | p50, ms | p95, ms | p99, ms |", "|---|---|---|---|---|"]
    for kind in KINDS:
        found = figures(results)[kind]
        times = " | ".join(f"{found[f'p{p}']:.1f}" if found["answers"] else "-" for p in PERCENTS)
        rows.append(f"| {kind} | {found['answers']} | {times} |")
    ended = f"{len(results['failed'])} failed; {results['late']} rounds of a client began late."
    return "\n".join([*rows, "", f"p95 of {' and '.join(JUDGED)}: below {MAX_P95_MS:g} ms. {ended}"])


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="harli-bench-") as name:
        results = run(Path(name), options)
    page = report.write(
        "http-api",
        "cpu",
        question="Do lists and states of jobs come fast over HTTP while many clients watch a full queue?",
        settings={
            "jobs": f"{options.jobs}, queued",
            "events": results["events"],
            "clients": f"{options.clients}, each a page of 20 jobs, one job, 20 of its events every {options.every:g} s",
            "seconds": options.seconds,
        },
        results={**results, "figures": figures(results)},
        table=table(results),
        not_shown=(
            "What requests for tokens cost in the same process: the routes are served alone here, and no job "
            "trains. The clients are niced, so on a busy machine the times hold their own waiting for a core."
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

"""First light on a GPU: does co-serving hold there, on Llama shapes of 1B and 8B with random
weights?

    python benchmark/gpu_smoke.py [--sizes 1b,8b] [--seconds 60] [--results DIR]

For each size one server (``--load-format dummy``, Triton attention, temporal mode, a TPOT target of
30 ms): serving alone, training alone, both together; greedy output with and without training, one
request at a time (on a GPU the batch's composition changes the rounding); at last a short job that
runs to its end and whose adapter answers.  Exits with 1 where an output differs, a request fails,
nothing is trained under load or the adapter does not answer.  ``--cpu`` is a dry run of this script
on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import load as bench_load
from common import report, servers

DATA_ROWS = 512
GREEDY_PROMPTS = 20
GREEDY_TOKENS = 32
JOB_LIMIT_S = 300.0
START_LIMIT_S = 600.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="First light on a GPU.")
    parser.add_argument("--sizes", default=None, help="comma-separated (default: 1b,8b; with --cpu: tiny)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each measured window")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests under load")
    parser.add_argument("--tpot-slo-ms", type=float, default=30.0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--flags", default="", help="more flags for the server, as one string")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    parser.add_argument("--cpu", action="store_true", help="dry run of the script on SGLang's CPU engine")
    return parser.parse_args(argv)


class Jobs:
    """The `harli` command line against one server."""

    def __init__(self, endpoint: str) -> None:
        self.command = [sys.executable, "-m", "sglang_harli.cli", "--endpoint", endpoint]

    def call(self, *words: str) -> dict[str, Any]:
        done = subprocess.run([*self.command, *words, "--json"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"harli {' '.join(words)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout)

    def submit(self, data: Path, **hyperparameters: object) -> str:
        pairs = [f"{k}={v}" for k, v in hyperparameters.items()]
        return self.call("submit", "--data", str(data), "--suffix", "smoke", *pairs)["id"]

    def show(self, job: str) -> dict[str, Any]:
        return self.call("show", job)

    def wait(self, job: str, enough: Callable[[dict[str, Any]], bool], limit_s: float) -> dict[str, Any]:
        """Poll until ``enough``; RuntimeError when the job fails or takes too long."""
        end = time.monotonic() + limit_s
        while True:
            state = self.show(job)
            if enough(state):
                return state
            if state["status"] in ("failed", "cancelled") or time.monotonic() > end:
                raise RuntimeError(f"job {job} is {state['status']}: {json.dumps(state)[:2000]}")
            time.sleep(0.5)


def write_data(path: Path, rows: int = DATA_ROWS) -> None:
    """Question and answer pairs of varied length, from a seed."""
    rng = random.Random(0)
    words = ["river", "stone", "seven", "lantern", "harbour", "quiet", "north", "copper", "window", "garden"]
    with path.open("w") as out:
        for n in range(rows):
            question = f"Number {n}: what follows " + " ".join(rng.choices(words, k=rng.randint(8, 60))) + "?"
            answer = " ".join(rng.choices(words, k=rng.randint(8, 60)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def start(model: Path, options: argparse.Namespace) -> servers.Server:
    flags = [
        "--load-format",
        "dummy",
        "--harli-tpot-slo-ms",
        str(options.tpot_slo_ms),
        *options.flags.split(),
    ]
    if options.cpu:
        return servers.start_server(model, *flags)
    flags += ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--random-seed", "1"]
    return servers.start_server(model, *flags, device="cuda")


def greedy(server: servers.Server, load: bench_load.Load) -> list[list[int]]:
    """Outputs of a fixed set of prompts, one request at a time, from an empty prefix cache."""
    servers.post(server, "/flush_cache", {})
    rng = random.Random("greedy")
    return [bench_load.generate(server.url, load.prompt(rng), GREEDY_TOKENS) for _ in range(GREEDY_PROMPTS)]


def finetune_window(jobs: Jobs, job: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do ``work``; its answer with the finetune tokens per second over the same time."""
    tokens, began = jobs.show(job)["trained_tokens"], time.monotonic()
    answer = work()
    trained = jobs.show(job)["trained_tokens"] - tokens
    return {**answer, "finetune_tokens_per_s": round(trained / (time.monotonic() - began), 1)}


def idle(seconds: float) -> dict[str, Any]:
    """A window without requests: its length is what is measured."""
    time.sleep(seconds)
    return {"seconds": seconds}


def smoke(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked of one model size."""
    from sglang_harli.tools.make_model import make_model

    model = folder / f"model-{size}"
    vocab = make_model(model, "llama", size=size, dtype="bfloat16", weights=False)["vocab_size"]
    data = folder / "data.jsonl"
    write_data(data)
    server = start(model, options)
    jobs = Jobs(server.endpoint)
    load = bench_load.Load(options.streams, options.prompt_tokens, options.output_tokens, vocab)
    try:
        found: dict[str, Any] = {"start_s": round(server.wait_ready(START_LIMIT_S), 1)}
        print(f"{size}: healthy after {found['start_s']} s", flush=True)
        bench_load.run(server.url, load, min(10.0, options.seconds))  # discarded
        before = greedy(server, load)
        found["serving_alone"] = bench_load.run(server.url, load, options.seconds)
        job = jobs.submit(data, n_epochs=10_000, batch_size=8, checkpoint_every=0)
        jobs.wait(job, lambda state: state["step"] >= 3, JOB_LIMIT_S)
        found["training_alone"] = finetune_window(jobs, job, lambda: idle(options.seconds))
        during = greedy(server, load)
        found["together"] = finetune_window(
            jobs, job, lambda: bench_load.run(server.url, load, options.seconds)
        )
        found["status"] = jobs.call("status")
        jobs.call("cancel", job)
        after = greedy(server, load)
        found["greedy_equal"] = {"during": during == before, "after": after == before}
        found["adapter"] = finish_one(server, jobs, data, load)
        found["attainment"] = {
            name: round(bench_load.attainment(found[name]["tpots_ms"], options.tpot_slo_ms), 4)
            for name in ("serving_alone", "together")
        }
        return found
    except (OSError, RuntimeError):
        print(server.log_tail(60), file=sys.stderr)
        raise
    finally:
        shutil.copy(server.log_path, options.results / f"gpu_smoke_{size}.log")
        server.kill()


def finish_one(server: servers.Server, jobs: Jobs, data: Path, load: bench_load.Load) -> dict[str, Any]:
    """A short job to its end; whether its adapter is listed and answers."""
    few = data.with_name("few.jsonl")
    few.write_text("".join(line + "\n" for line in data.read_text().splitlines()[:32]))
    job = jobs.submit(few, n_epochs=2, batch_size=8)
    name = jobs.wait(job, lambda state: state["status"] == "succeeded", JOB_LIMIT_S)["fine_tuned_model"]
    listed = [m["id"] for m in servers.get(server, "/v1/models")["data"]]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "What follows the river?"}],
        "max_tokens": 8,
    }
    answer = servers.post(server, "/v1/chat/completions", body)
    return {"name": name, "listed": name in listed, "answered_as": answer["model"]}


def problems(found: dict[str, Any]) -> list[str]:
    wrong = [
        f"greedy output differs {when} training" for when, same in found["greedy_equal"].items() if not same
    ]
    if found["training_alone"]["finetune_tokens_per_s"] <= 0:
        wrong.append("nothing was trained while idle")
    if found["together"]["finetune_tokens_per_s"] <= 0:
        wrong.append("nothing was trained under load")
    if not found["adapter"]["listed"]:
        wrong.append("the adapter is not listed")
    return wrong


def table(results: dict[str, Any]) -> str:
    rows = [
        "| | decode tokens/s | TPOT p50 / p99, ms | on time | finetune tokens/s |",
        "|---|---|---|---|---|",
    ]
    for size, found in results.items():
        for name in ("serving_alone", "training_alone", "together"):
            part = found[name]
            tpot = part.get("tpot_ms")
            cells = [
                f"{part['decode_tokens_per_s']:.0f}" if tpot else "-",
                f"{tpot[50]:.1f} / {tpot[99]:.1f}" if tpot else "-",
                f"{found['attainment'][name]:.4f}" if tpot else "-",
                str(part.get("finetune_tokens_per_s", "-")),
            ]
            rows.append(f"| {size}, {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    equal = ", ".join(f"{s} {f['greedy_equal']}" for s, f in results.items())
    return "\n".join([*rows, "", f"Greedy output equal to that before training: {equal}."])


def main() -> int:
    options = parse()
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print("no CUDA device: this measures a GPU (--cpu is a dry run of the script)", file=sys.stderr)
        return 2
    options.results = options.results.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    sizes = (options.sizes or ("tiny" if options.cpu else "1b,8b")).split(",")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="harli-bench-") as name:
        for size in sizes:
            results[size] = smoke(size, Path(name), options)
            print(json.dumps({k: v for k, v in results[size].items() if k != "status"})[:4000], flush=True)
    page = report.write(
        "gpu_smoke",
        "cpu-dry-run" if options.cpu else "gpu",
        question="Does serving keep its target, and its output, while a LoRA job trains on the same weights?",
        settings={
            "models": f"Llama shapes {', '.join(sizes)}, random weights (--load-format dummy), bf16",
            "load": f"{options.streams} streams, {options.prompt_tokens} prompt and {options.output_tokens} output",
            "job": "rank 16 on all linear layers, batch_size 8, temporal mode",
            "target": f"{options.tpot_slo_ms} ms per output token",
            "window": f"{options.seconds} s each",
        },
        results=results,
        table=table(results),
        not_shown=(
            "Quality (the weights are random), other attention backends, arrivals that are not a closed loop, "
            "and anything about sharing SMs: training and decode take turns here. One run, no interval."
        ),
        folder=options.results,
    )
    print(table(results))
    print(f"written: {page}")
    wrong = [f"{size}: {what}" for size, found in results.items() for what in problems(found)]
    print("\n".join(f"FAIL: {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())

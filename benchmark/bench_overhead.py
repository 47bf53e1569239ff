"""With no job and no adapter in the batch, does decode cost what plain SGLang's costs?

    python benchmark/bench_overhead.py [--launches 3] [--blocks 16] [--batch 8] [--tokens 48]

A 25M-parameter model.  Three servers run at once: plain SGLang (no plugin, no LoRA), ours with its
LoRA serving and finetune service, and a second plain one as the control.  Short blocks of the same
fixed batch alternate between them; the two that are not measured are held by SIGSTOP, because an
idle SGLang scheduler spins on a core.  Two identical servers differ by up to 2% from launch to
launch, so everything is launched anew several times and the 95% interval (Student's t, on
logarithms) is taken over launches. Exits with 1 when the interval's lower end is above 1.02 and
above the upper end of the control's.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import report, servers

LIMIT = 1.02
PROMPT_TOKENS = 16
SIDES = ("plain", "ours", "control")
# Two-sided 95% points of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode without a job against plain SGLang.")
    parser.add_argument(
        "--model", type=Path, help="model folder (default: a 25M Llama, bf16, made for this run)"
    )
    parser.add_argument("--launches", type=int, default=3, help="launches of each side, 2 to 10 (default: 3)")
    parser.add_argument("--blocks", type=int, default=16, help="measured blocks of each side per launch")
    parser.add_argument("--batch", type=int, default=8, help="requests in the batch")
    parser.add_argument("--tokens", type=int, default=48, help="output tokens of each request in a block")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    if options.launches - 1 not in T_95:
        parser.error("--launches: give 2 to 10")
    return options


def batch_body(batch: int, tokens: int, vocab: int) -> dict[str, Any]:
    """The fixed batch: the same prompts in every block, so that prefill is a prefix-cache hit."""
    rng = random.Random(0)
    prompts = [[rng.randrange(10, vocab) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    return {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }


def block(server: servers.Server, body: dict[str, Any]) -> float:
    """Seconds of decode per token of one block; a short one before it wakes caches and threads."""
    warm = {**body, "sampling_params": {**body["sampling_params"], "max_new_tokens": 4}}
    with servers.running(server):
        servers.post(server, "/generate", warm)
        began = time.perf_counter()
        servers.post(server, "/generate", body)
        return (time.perf_counter() - began) / body["sampling_params"]["max_new_tokens"]


def one_launch(
    start: dict[str, Callable[[], servers.Server]], body: dict[str, Any], blocks: int
) -> dict[str, list[float]]:
    """Start all sides, alternate blocks between them in a changing order, end them."""
    times: dict[str, list[float]] = {name: [] for name in start}
    rng = random.Random(1)
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, begin in start.items():
            sides[name] = server = begin()
            stack.enter_context(servers.ended(server))
            server.wait_ready()
            servers.hold(server)
        for server in sides.values():  # discarded: fills the prefix cache
            block(server, body)
        for _ in range(blocks):
            order = list(sides)
            rng.shuffle(order)
            for name in order:
                times[name].append(block(sides[name], body))
    return times


def log_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over rounds of the logarithm of one side's time by the other's in the same
    round."""
    return statistics.median(math.log(a / b) for a, b in zip(over, under, strict=True))


def interval(logs: Sequence[float]) -> dict[str, float]:
    """Mean and 95% interval of ratios, from one logarithm per launch."""
    mean = statistics.fmean(logs)
    half = T_95[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    names = {"ratio": mean, "lower": mean - half, "upper": mean + half}
    return {name: round(math.exp(value), 5) for name, value in names.items()}


def verdict(ours: dict[str, float], control: dict[str, float]) -> bool:
    """Whether the overhead is shown to be too large."""
    return ours["lower"] > LIMIT and ours["lower"] > control["upper"]


def run(model: Path, options: argparse.Namespace, vocab: int) -> dict[str, Any]:
    probe = servers.ours(model)
    with servers.ended(probe):
        probe.wait_ready()
        limits = servers.limits_of(probe)
    flags = servers.flags_for(limits, lora=False)
    print("same flags for plain SGLang: " + " ".join(flags), flush=True)
    body = batch_body(options.batch, options.tokens, vocab)
    launches = []
    for n in range(options.launches):
        start = {
            "plain": lambda: servers.plain(model, flags),
            "ours": lambda: servers.ours(model),
            "control": lambda: servers.plain(model, flags),
        }
        times = one_launch(start, body, options.blocks)
        launches.append(times)
        medians = ", ".join(f"{side} {statistics.median(times[side]) * 1e3:.2f} ms" for side in SIDES)
        print(f"launch {n + 1}: {medians} a token", flush=True)
    return {
        "launches": launches,
        "ours_over_plain": interval([log_ratio(t["ours"], t["plain"]) for t in launches]),
        "control_over_plain": interval([log_ratio(t["control"], t["plain"]) for t in launches]),
        "limits": limits,
    }


def table(results: dict[str, Any]) -> str:
    rows = ["| | ratio | 95% interval over launches |", "|---|---|---|"]
    for key, name in (("ours_over_plain", "ours / plain"), ("control_over_plain", "plain / plain (control)")):
        value = results[key]
        rows.append(f"| {name} | {value['ratio']:.4f} | {value['lower']:.4f} to {value['upper']:.4f} |")
    rows += ["", "| launch | " + " | ".join(f"{s}, ms a token" for s in SIDES) + " |", "|---|---|---|---|"]
    for n, times in enumerate(results["launches"], 1):
        cells = " | ".join(f"{statistics.median(times[s]) * 1e3:.2f}" for s in SIDES)
        rows.append(f"| {n} | {cells} |")
    return "\n".join(rows)


def main() -> int:
    options = parse()
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="harli-bench-") as name:
        model = options.model
        if model is None:
            from sglang_harli.tools.make_model import make_model

            model = Path(name) / "model"
            make_model(model, "llama", size="25m", dtype="bfloat16", seconds=0)
        model = model.resolve()
        results = run(model, options, AutoConfig.from_pretrained(model).vocab_size)
    page = report.write(
        "overhead",
        "cpu",
        question="With no job and no adapter in the batch, does decode cost what plain SGLang's costs?",
        settings={
            "model": options.model or "Llama, 512 wide, 8 layers, 25M parameters, bf16, random weights",
            "batch": f"{options.batch} requests, {PROMPT_TOKENS} prompt tokens (cached), {options.tokens} output",
            "blocks": f"{options.blocks} of each side per launch, order shuffled in each round",
            "launches": options.launches,
        },
        results=results,
        table=table(results),
        not_shown=(
            "Anything about a batch that holds an adapter, a running job, or a GPU (where decode graphs are the "
            "question). A block's time holds one cached prefill of the batch, the same on each side."
        ),
        folder=options.results,
    )
    print(table(results))
    print(f"written: {page}")
    if verdict(results["ours_over_plain"], results["control_over_plain"]):
        print(f"FAIL: the overhead is above {LIMIT} and above the control")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

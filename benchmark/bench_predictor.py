"""Is the latency predictor cheap, right, and as safe as it says?

    python benchmark/bench_predictor.py [--steps 6000] [--seeds 5] [--calls 20000] [--server]

Without ``--server`` neither a server nor a model.  *Cost*: microseconds of one estimate, of the
prices of all sizes of a quantum, of one observation, and of one whole decision of the scheduler
(prices, slack of a batch of 32, policy), p50 and p99. *Error and coverage*: on generated loads
whose batch and contexts wander, each step predicted before it is learnt (so every one is held out),
with several kinds of scatter; at two thirds the speed of the machine changes. Exits with 1 when a
decision takes 50 us or more (p99), an error is 10% or more, or an upper bound covers less than 98%
of the steps, before the change or from 200 steps after it.

With ``--server`` nothing of that, but the predictions of a real one on the CPU engine (a
25M-parameter model): decode steps of mixed loads while a job trains; then another process takes
half a core, and gives it back.  Exits with 1 when the error is 10% or more, a bound covers less
than 98% of the steps, or coverage is not back within 200 steps of a change.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import report
from sglang_harli.config import HarliOptions
from sglang_harli.core import QuantumKind, QuantumOffer, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.policy.slo_ledger import PlainProgress
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.managers.scheduler.training.quantum_prices import SIZES
from sglang_harli.predictor.latency_predictor import LatencyPredictor

DECISION_US, MAPE, COVERAGE, BACK_WITHIN = 50.0, 0.10, 0.98, 200
WARM_UP = 300  # steps that are shown and not judged: the predictor starts from a guess
SPEEDS = (0.7, 1.6)
BATCH, ROW_TOKENS = 32, 256

# Milliseconds: base, per request, per token of context, and a share that no line has (batches in
# steps of 8).
MACHINES = {
    "cpu, 25M": (7.0, 0.9, 4e-4, 0.0),
    "gpu, 8B": (18.0, 0.05, 1.5e-4, 0.0),
    "stairs": (10.0, 0.5, 2e-4, 0.1),
}
NOISES: dict[str, Callable[[random.Random], float]] = {
    "quiet, 1%": lambda rng: rng.gauss(1, 0.01),
    "usual, 6%": lambda rng: rng.lognormvariate(0, 0.06),
    "accidents, 2%": lambda rng: rng.gauss(1, 0.03) * (rng.uniform(1.5, 3) if rng.random() < 0.02 else 1.0),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost, error and coverage of the latency predictor.")
    parser.add_argument("--steps", type=int, default=6000, help="steps of each load, 1500 or more")
    parser.add_argument("--seeds", type=int, default=5, help="loads of each kind")
    parser.add_argument("--calls", type=int, default=20_000, help="calls of each kind that are timed")
    parser.add_argument("--server", action="store_true", help="judge a real server's predictions instead")
    parser.add_argument("--model", type=Path, help="with --server: model folder (default: a Llama, bf16)")
    parser.add_argument("--size", default="25m", help="with --server: of the model that is made: tiny, 25m")
    parser.add_argument("--span", type=int, default=2000, help="with --server: decode steps of each span")
    parser.add_argument("--limit-s", type=float, default=300.0, help="with --server: most seconds of a span")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    if options.steps < 1500 or options.seeds < 1 or options.calls < 100:
        parser.error("give --steps of at least 1500, --seeds of at least 1, --calls of at least 100")
    return options


# ------------------------------------------------------------------ error and coverage
def wandering(machine: tuple[float, ...], rng: random.Random, steps: int) -> list[tuple[int, int, float]]:
    """(batch, context tokens, seconds without scatter) of each step: requests come, grow and go."""
    base, per_request, per_token, stairs = machine
    lengths: list[int] = [rng.randint(20, 500)]
    load = rng.uniform(1, 12)
    out = []
    for _ in range(steps):
        if rng.random() < 0.01:
            load = rng.choice((1, 2, 4, 8, 16, 32)) * rng.uniform(0.7, 1.0)
        if len(lengths) < load and rng.random() < 0.3:
            lengths.append(rng.randint(20, 1500))
        if len(lengths) > max(load, 1) and rng.random() < 0.1:
            lengths.pop(rng.randrange(len(lengths)))
        lengths = [n + 1 for n in lengths]
        batch, context = len(lengths), sum(lengths)
        whole = (base + per_request * batch + per_token * context) * (1 + stairs * (batch > 8))
        out.append((batch, context, whole / 1e3))
    return out


def one_load(
    machine: tuple[float, ...], noise: Callable, speed: float, steps: int, seed: int
) -> dict[str, Any]:
    """Error and coverage before the change of speed and after it."""
    rng, predictor = random.Random(seed), LatencyPredictor()
    change = steps * 2 // 3
    errors, covered = [], []
    for n, (batch, context, clean) in enumerate(wandering(machine, rng, steps)):
        seconds = clean * noise(rng) * (speed if n >= change else 1.0)
        estimate = predictor.decode(batch, context)
        errors.append(abs(estimate.expected_s - seconds) / seconds)
        covered.append(seconds <= estimate.upper_s)
        predictor.observe_decode(batch, context, seconds)
    settled = change + BACK_WITHIN
    return {
        "mape": statistics.fmean(errors[WARM_UP:change]),
        "coverage": statistics.fmean(covered[WARM_UP:change]),
        "mape_after": statistics.fmean(errors[settled:]),
        "coverage_after": statistics.fmean(covered[settled:]),
        "back_after": back_after(covered[change:]),
        "upper_ratio": predictor.scores()["decode"][1],
    }


def back_after(covered: Sequence[bool]) -> int:
    """Steps after a change until the next 200 are covered as promised; their number when they never
    are."""
    window = min(BACK_WITHIN, len(covered))
    for start in range(len(covered) - window + 1):
        if sum(covered[start : start + window]) >= COVERAGE * window:
            return start
    return len(covered)


def loads(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Each kind of load: means over seeds and changes; the slowest return."""
    out = {}
    for machine_name, machine in MACHINES.items():
        for noise_name, noise in NOISES.items():
            runs = [
                one_load(machine, noise, speed, options.steps, seed)
                for seed in range(options.seeds)
                for speed in SPEEDS
            ]
            row = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
            row["back_after"] = max(run["back_after"] for run in runs)
            out[f"{machine_name}; {noise_name}"] = row
            print(f"{machine_name}; {noise_name}: {row}", flush=True)
    return out


# ------------------------------------------------------------------ cost
def timed(call: Callable[[int], object], calls: int) -> dict[str, float]:
    """Microseconds of single calls."""
    for n in range(200):
        call(n)
    took = []
    for n in range(calls):
        began = time.perf_counter_ns()
        call(n)
        took.append((time.perf_counter_ns() - began) / 1e3)
    took.sort()
    return {"p50_us": took[calls // 2], "p99_us": took[calls * 99 // 100], "max_us": took[-1]}


def costs(calls: int) -> dict[str, dict[str, float]]:
    rng, side = random.Random(0), ServingState(HarliOptions())
    predictor, kind = side.predictor, QuantumKind.BACKWARD
    times = [rng.lognormvariate(0, 0.05) for _ in range(1024)]
    rows = [rng.choice((1, 2, 4, 8)) for _ in range(1024)]
    for n in range(1024):
        predictor.observe_decode(rows[n], 500 * rows[n], (7e-3 + 1e-3 * rows[n]) * times[n])
    for n in range(64):  # hold-ups by new requests, so that the reserve is not empty
        prompt = rows[n] * 100
        prefill = BatchLoad(
            is_decode=False, requests=1, context_tokens=prompt, new_tokens=prompt, pairs=prompt**2 // 2
        )
        decode = BatchLoad(
            is_decode=True, requests=BATCH, context_tokens=500 * BATCH, new_tokens=BATCH, pairs=0
        )
        side.step(prefill, 0.01 * times[n], 0.1)
        for _ in range(rows[n]):
            side.step(decode, 0.01, 0.1)
    clocks = [PlainProgress(0.0, 1.0 + n / 100, 30) for n in range(BATCH)]
    load = StepLoad(running=BATCH, context_tokens=500 * BATCH)

    def observe(n: int) -> None:
        count, seconds = rows[n % 1024], times[n % 1024]
        tokens = count * ROW_TOKENS
        predictor.observe_quantum(kind, tokens, ROW_TOKENS, seconds * 1e-4 * tokens)

    def decision(_n: int) -> None:
        offer = QuantumOffer(kind, predictor.prices(kind, SIZES, ROW_TOKENS))
        slack = side.slack(clocks, load.context_tokens, 1.4, 0.0)
        qos_policy.decide(load, slack, offer, side.targets)

    return {
        "observe a quantum": timed(observe, calls),
        "estimate a decode step": timed(lambda n: predictor.decode(rows[n % 1024], 4000), calls),
        f"prices of {len(SIZES)} sizes": timed(lambda n: predictor.prices(kind, SIZES, ROW_TOKENS), calls),
        f"decision, batch of {BATCH}": timed(decision, calls),
    }


# ------------------------------------------------------------------ the verdict
def judge(cost: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> list[str]:
    """What does not hold, a sentence each."""
    wrong = [
        f"{name}: p99 {values['p99_us']:.1f} us, must be below {DECISION_US:g}"
        for name, values in cost.items()
        if name.startswith("decision") and values["p99_us"] >= DECISION_US
    ]
    if not any(name.startswith("decision") for name in cost):
        wrong.append("no decision was timed")
    if not found:
        wrong.append("no load was predicted")
    for name, row in found.items():
        for key in ("mape", "mape_after"):
            if not row[key] < MAPE:
                wrong.append(f"{name}: {key} {100 * row[key]:.2f}%, must be below {100 * MAPE:g}%")
        for key in ("coverage", "coverage_after"):
            if not row[key] >= COVERAGE:
                wrong.append(f"{name}: {key} {100 * row[key]:.2f}%, must be at least {100 * COVERAGE:g}%")
        if row["back_after"] > BACK_WITHIN:
            wrong.append(
                f"{name}: covered again {row['back_after']:g} steps after the change, must be 200 at most"
            )
    return wrong


def table(cost: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> str:
    lines = ["| cost | p50, us | p99, us |", "|---|---|---|"]
    lines += [f"| {name} | {v['p50_us']:.1f} | {v['p99_us']:.1f} |" for name, v in cost.items()]
    head = ("load", "error", "covered", "error after", "covered after", "back after", "upper bound")
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in found.items():
        shares = (100 * row[k] for k in ("mape", "coverage", "mape_after", "coverage_after"))
        cells = " | ".join(f"{share:.2f}%" for share in shares)
        lines.append(f"| {name} | {cells} | {row['back_after']:.0f} steps | {row['upper_ratio']:.2f} |")
    return "\n".join(lines)


def judge_server(options: argparse.Namespace) -> int:
    from prediction import server as real  # it needs the whole stack

    found = real.measure(options.model, options.size, options.span, options.limit_s)
    wrong, shown = real.judge(found), real.table(found)
    print(shown)
    page = report.write(
        "predictor_server",
        "cpu",
        question="How good are the latency predictor's bounds on a real server that trains meanwhile?",
        settings={
            "model": str(options.model or options.size),
            "loads": f"closed loops, 4 s each in turn (streams, prompt, output tokens): {real.MIXES}",
            "judged": f"decode steps from the {real.WARM_UP}th on; after a change, from {real.BACK_WITHIN} steps on",
            "spans": f"{options.span} decode steps or {options.limit_s:g} s each",
        },
        results={"server": found, "wrong": wrong},
        table=shown,
        not_shown="One machine and one model. What else ran on the machine is not controlled, other than the "
        "process that takes half a core.",
        folder=options.results,
    )
    print(page)
    for line in wrong:
        print("does not hold: " + line, file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    options = parse()
    if options.server:
        return judge_server(options)
    cost = costs(options.calls)
    found = loads(options)
    wrong = judge(cost, found)
    shown = table(cost, found)
    print(shown)
    page = report.write(
        "predictor",
        "cpu",
        question="Is the latency predictor cheap, right, and as safe as it says?",
        settings={
            "loads": f"{options.seeds} seeds, {options.steps} steps each; speed changes by {SPEEDS} at two thirds",
            "judged": f"means over seeds and changes (the slowest return), from step {WARM_UP} to the change, and from {BACK_WITHIN} steps after it",
            "timed": f"{options.calls} calls of each kind",
        },
        results={"cost": cost, "loads": found, "wrong": wrong},
        table=shown,
        not_shown="The loads are generated: how well a line fits a real machine is measured by `--server`, and at run "
        "time (`prediction` in `harli status`).",
        folder=options.results,
    )
    print(page)
    for line in wrong:
        print("does not hold: " + line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

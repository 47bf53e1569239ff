"""How much does a server train in the time that its latency target leaves over, and does it keep
the target?

    python benchmark/bench_colocate.py [--quick] [--json FILE]
    python benchmark/bench_colocate.py --device cuda --model-size 8b [--quick]
    python benchmark/bench_colocate.py --disaggregated [--quick] [--trace FILE]    # a prefill/decode pair (disaggregated/run.py)

Side by side in one run, on the same requests from SGLang's own bench_serving: serve-only (plain
SGLang), train-only (ours without requests, and a plain transformers + peft loop), serving and that
loop as separate processes (uncoordinated; at nice 19 with --sleep-on-idle; with a duty cycle),
fixed time slices, and harli.  Loads are per cent of the time that serve-only is busy, calibrated
first; targets are multiples of its median TPOT there, set by ``harli set`` while the server runs.
Our server with its job paused is a control: what of a difference is training's.

Everything is started once; only what is measured runs, the rest is held by SIGSTOP.  A repetition
measures every cell once, in an order drawn anew; ratios are taken within a repetition.  The rule by
which a disturbed cell is left out is in ``colocate/noise.py``, what must hold in
``colocate/judge.py``.  Where too few requests are left, harli and serve-only are measured in
further repetitions; ``--resume`` goes on with a run that was ended, on its targets and rates.
Exits with 1 exactly when a row fails: when the whole 95% interval of its ratio is on the wrong
side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from colocate import noise, picture
from colocate import report as colocate_report
from colocate.calibrate import calibrate
from colocate.client import pinned
from colocate.judge import (
    FAILS,
    HARLI,
    IDLE,
    MODES,
    NICE,
    PAUSED,
    PLAIN_LOOP,
    SEPARATE,
    SERVE,
    SLICES,
    TRAIN,
    UNCOORDINATED,
    judge,
)
from colocate.modes import CUT_AFTER, Place, Rig
from colocate.plan import Cell, baseline_of, in_blocks, plan, plan_lacking, targets_of
from common import report as bench_report
from disaggregated import run as disaggregated

WARM_REQUESTS = 12
REQUESTS, BASELINE_REQUESTS, SECONDS = 400, 120, 60.0  # of a cell, all repetitions together
CUDA_MODES = (SERVE, TRAIN, HARLI, SLICES)
QUICK_MODES = {"cpu": (SERVE, TRAIN, PLAIN_LOOP, HARLI, NICE), "cuda": CUDA_MODES}
MACHINE = ("cpu", "cores", "gpu")
LIMITS = ("--max-total-tokens", "65536", "--max-running-requests", "32")
CUDA_FLAGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--random-seed", "1"),
    # two servers stand on the device: what each holds is set by its tokens
    *("--mem-fraction-static", "0.8"),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="loads idle and 40, targets 1.5 and 4, fewer requests and modes")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model-size", default=None, help="of make-model: tiny, 25m, 100m, 1b, 8b (default: 25m; cuda: 8b)")
    add("--loads", help="comma-separated: idle and per cent busy (default: idle,40,60,80)")
    add("--targets", help="multiples of serve-only's median TPOT (default: 1.5,2,4; cuda: none)")
    add("--targets-ms", help="targets in milliseconds instead (default on cuda: 20,30,50)")
    add(
        "--modes",
        help=f"comma-separated (default: all; cuda: without separate processes): {', '.join(MODES)}",
    )
    add("--repetitions", type=int, help="(default: 10; quick and cuda: 3; both: 1)")
    add("--requests", type=int, help="of a cell of one repetition (default: 400 of all; quick: 20)")
    add(
        "--baseline-requests",
        type=int,
        help="the same of the baselines (default: 120 of all; quick: as --requests)",
    )
    add("--seconds", type=float, help="of a cell without requests (default: 60 of all; quick: 5)")
    add(
        "--limit-minutes",
        type=float,
        help="no repetition begins that would end later (default: 175; quick: 9.5, cuda 3.5)",
    )
    add("--flags", default="", help="more flags of every server, as one string")
    add("--seed", type=int, default=1, help="of the order of cells")
    add("--json", type=Path, help="write every number there as well")
    add(
        "--resume",
        type=Path,
        help="a file that --json wrote: go on with it, same machine and options",
    )
    add("--results", type=Path, default=bench_report.RESULTS, help="folder of the result files")
    disaggregated.add_options(parser)
    options = parser.parse_args(argv)
    if options.disaggregated:
        options.model_size = options.model_size or "25m"
    else:
        _defaults(options, parser)
    return options


def _defaults(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    quick, cuda = options.quick, options.device == "cuda"
    options.model_size = options.model_size or ("8b" if cuda else "25m")
    loads = (options.loads or ("idle,40" if quick or cuda else "idle,40,60,80")).split(",")
    modes = (options.modes or ",".join(_modes(options))).split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        parser.error(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    options.modes = {SERVE, *modes}
    try:
        options.loads = sorted(IDLE if load == "idle" else int(load) for load in loads)
        ms = options.targets_ms or ("20,30,50" if cuda and not options.targets else "")
        multiples = options.targets or ("" if ms else "1.5,4" if quick else "1.5,2,4")
        options.targets_ms = [float(value) for value in ms.split(",") if value]
        options.targets = [float(value) for value in multiples.split(",") if value]
    except ValueError as error:
        parser.error(str(error))
    if any(load and not 1 <= load <= 95 for load in options.loads):
        parser.error("--loads: give idle, and per cent from 1 to 95")
    # many short repetitions: what is compared is measured within minutes, and the machine's speed
    # changes in those
    options.repetitions = options.repetitions or ((1 if cuda else 3) if quick else 3 if cuda else 10)
    options.requests = options.requests or (
        (16 if cuda else 20) if quick else math.ceil(REQUESTS / options.repetitions)
    )
    options.baseline_requests = options.baseline_requests or (
        options.requests if quick else math.ceil(BASELINE_REQUESTS / options.repetitions)
    )
    options.seconds = options.seconds or (5.0 if quick else SECONDS / options.repetitions)
    options.limit_minutes = options.limit_minutes or ((3.5 if cuda else 9.5) if quick else 175.0)
    try:
        options.begun = resumed(options)
    except ValueError as error:
        parser.error(str(error))


def _modes(options: argparse.Namespace) -> tuple[str, ...]:
    if options.quick:
        return QUICK_MODES[options.device]
    return CUDA_MODES if options.device == "cuda" else MODES


# ------------------------------------------------------------------ the run
def repetition(
    rig: Rig,
    options: argparse.Namespace,
    results: dict[str, Any],
    number: int,
    over_s: float,
    cells: list[Cell],
) -> None:
    """Measure every cell once in an order of its own, disturbed ones once again at the end."""
    order = in_blocks(cells, random.Random(f"{options.seed}-{number}"))
    alone_s: dict[Any, float] = {}

    def measure(cell: Cell) -> dict[str, Any]:
        if cell.mode in SEPARATE:
            cell = replace(cell, limit_s=CUT_AFTER * alone_s[cell.load, cell.requests])
        found = rig.measure(cell)
        if cell.mode == SERVE:
            alone_s[cell.load, cell.requests] = found["seconds"]
        results["cells"].append(found)
        print(colocate_report.line(found), flush=True)
        return found

    again = [cell for cell in order if measure(cell)["disturbed"]]
    for cell in again:
        if time.monotonic() < over_s:
            measure(cell)


def resumed(options: argparse.Namespace) -> dict[str, Any] | None:
    """The results to go on with; None: from the beginning.

    Raises:
        ValueError: the file is no such thing, or was measured under other options or on another
            machine.
    """
    if options.resume is None:
        return None
    try:
        document = json.loads(options.resume.read_text())
        results, measured_at = document["results"], document["meta_info"]
        commit = measured_at["commit"]
        found = {name: results[name] for name in measured_under(options)}
        found |= {name: measured_at[name] for name in MACHINE}
        found["targets"] = {load: [*targets] for load, targets in results["targets"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--resume {options.resume}: not a file that --json wrote ({error!r})") from None
    labels = [*targets_of(options, 1.0)]
    asked = measured_under(options) | {"targets": {str(load): labels for load in options.loads if load}}
    for name, value in asked.items():
        if found[name] != value:
            raise ValueError(
                f"--resume {options.resume}: {name} there: {found[name]!r}; asked for: {value!r}"
            )
    # targets and rates are of the processor that they were calibrated on: on another one they say
    # nothing
    here = bench_report.meta_info()
    for name in MACHINE:
        if found[name] != here[name]:
            raise ValueError(
                f"--resume {options.resume}: {name} there: {found[name]!r}; this machine's: {here[name]!r}"
            )
    results.setdefault("commits", [commit])
    return results


def measured_under(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a run have in common."""
    names = ("device", "model_size", "flags")
    return {name: getattr(options, name) for name in names} | {"noise_rule": noise.RULE}


def run(options: argparse.Namespace, place: Place, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    began = time.monotonic()
    over_s = began + 60 * options.limit_minutes
    results: dict[str, Any] = options.begun or {
        **measured_under(options),
        "reference_ms": None,
        "cells": [],
        "repetitions_done": 0,
        "seconds": 0,
        "commits": [],
    }
    results["commits"].append(bench_report.commit())
    before_s = results["seconds"]
    print(f"noise rule: {results['noise_rule']}", flush=True)
    watch = noise.Watch(noise.Pieces(), results["reference_ms"])
    with Rig(place, watch) as rig:
        names = ["plain", *(["ours"] if options.modes & {TRAIN, HARLI, PAUSED, SLICES} else [])]
        names += ["sleepy"] if NICE in options.modes else []
        nices = [0] if options.modes & {PLAIN_LOOP, UNCOORDINATED} else []
        rig.start(names, [*nices, *([19] if NICE in options.modes else [])])
        results["start_s"], results["limits"] = rig.start_s, rig.limits()
        print(f"all up after {time.monotonic() - began:.0f} s: {rig.start_s}", flush=True)
        if options.begun is None:
            calibrated(rig, options, results)
            results["reference_ms"] = watch.calibrated()
        print(f"pieces of work, ms: {results['reference_ms']}", flush=True)
        if HARLI in options.modes and results["baseline"]:
            warm_up(rig, results)
        took_s, number = 0.0, results["repetitions_done"] + 1
        while cells := (plan if number <= options.repetitions else plan_lacking)(options, results, number):
            started = time.monotonic()
            if took_s and started + took_s > over_s:
                print(f"no time for another repetition within {options.limit_minutes:g} minutes", flush=True)
                break
            repetition(rig, options, results, number, over_s, cells)
            results["repetitions_done"] = number
            results["seconds"] = round(before_s + time.monotonic() - began)
            save(results)
            took_s, number = time.monotonic() - started, number + 1
    results["seconds"] = round(before_s + time.monotonic() - began)
    return results


def calibrated(rig: Rig, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Rates and targets of each load, and where the baselines are compared."""
    busy = [load for load in options.loads if load]
    count, rounds = (options.requests, 1) if options.quick else (max(options.requests // 2, 12), 4)
    results["calibration"] = found = calibrate(rig, busy, count, rounds)
    medians_ms = {load: row["tpot_ms"] for load, row in found["loads"].items()}
    results["targets"] = {load: targets_of(options, ms) for load, ms in medians_ms.items()}
    results["baseline"] = baseline_of(medians_ms, results["targets"])
    print(f"calibrated: {json.dumps(found)}", flush=True)


def warm_up(rig: Rig, results: dict[str, Any]) -> None:
    """Discarded: our server begins with cautious estimates, and they settle within some hundred
    steps."""
    at = results["baseline"]
    load = str(at["load"])
    rate = results["calibration"]["loads"][load]["rate"]
    target_ms = results["targets"][load][at["target"]]
    rig.measure(Cell(HARLI, "", at["load"], 0, requests=WARM_REQUESTS, rate=rate, target_ms=target_ms))


def make_place(options: argparse.Namespace, folder: Path, cores: frozenset[int] | None) -> Place:
    """The model, and what is the same for every server."""
    from sglang_harli.tools.make_model import make_model

    dummy = options.model_size in ("1b", "8b")
    model = folder / "model"
    make_model(model, "llama", size=options.model_size, dtype="bfloat16", seconds=0, weights=not dummy)
    flags = [*LIMITS, *(CUDA_FLAGS if options.device == "cuda" else ())]
    flags += ["--load-format", "dummy"] if dummy else []
    output_tokens = 64 if options.device == "cuda" else 40
    return Place(
        model=model,
        folder=folder,
        device=options.device,
        prompt_tokens=128,
        output_tokens=output_tokens,
        ratio=0.5,
        flags=(*flags, *options.flags.split()),
        client_cores=cores,
        weights_bytes=_weights_bytes(model),
    )


def _weights_bytes(model: Path) -> int:
    """Of one copy, bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return 2 * AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).num_parameters()


def report(options: argparse.Namespace, place: Place, results: dict[str, Any], text: str) -> Path:
    """JSON, page and picture; the path of the page."""
    return bench_report.write(
        "colocate-quick" if options.quick else "colocate",
        options.device,
        question="How much does a server train in the time that its latency target leaves over, and is the target kept?",
        settings={
            "model": f"Llama, {options.model_size}, bf16, random weights of {place.weights_bytes / 2**20:.0f} MiB: one copy in "
            "harli, two in separate processes",
            "requests": f"{options.requests} a cell and repetition ({options.baseline_requests} of the baselines), "
            f"{place.prompt_tokens // 2} to {place.prompt_tokens} prompt and {place.output_tokens // 2} to "
            f"{place.output_tokens} output tokens, Poisson arrivals, cache flushed before each cell",
            "job": "LoRA rank 16 on all linear layers, micro-batches of 4 rows of 256 tokens, in every mode",
            "servers": " ".join(place.flags),
            "loads": ", ".join(f"{load}% busy" if load else "idle" for load in options.loads),
            "without requests": f"{options.seconds:g} s a cell",
            "cores": "the load client has one of its own" if place.client_cores else "shared by everything",
        },
        results=results,
        table=text,
        picture=picture.svg(results),
        not_shown=(
            "Other models and lengths, requests that share prefixes, adapters in the batch, and the quality of what is "
            "trained. The load client runs on the same machine. Harvest is finetune tokens/s over train-only's; efficiency "
            "divides it by the share of time that serve-only left idle in the same repetition. A row that is open is "
            "neither shown to hold nor to fail."
        ),
        folder=options.results,
    )


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    # an exception, so that nothing is left behind: servers stand in sessions of their own, and held
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.disaggregated:
        return disaggregated.main(options)

    def save(results: dict[str, Any]) -> None:
        if options.json is not None:
            document = {"results": results, "meta_info": bench_report.meta_info()}
            options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")

    with (
        tempfile.TemporaryDirectory(prefix="harli-colocate-", ignore_cleanup_errors=True) as name,
        pinned() as cores,
    ):
        place = make_place(options, Path(name), cores)
        results = run(options, place, save)
    rows = judge(results)
    results["verdicts"] = [{"row": row.text, "verdict": row.verdict} for row in rows]
    text = colocate_report.page(results, rows)
    save(results)
    page = report(options, place, results, text)
    print(text)
    print(f"written: {page} ({results['seconds']} s)")
    failed = [row for row in rows if row.verdict == FAILS]
    for row in failed:
        print(f"FAILED: {row.text}: {row.found}, bound {row.bound:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

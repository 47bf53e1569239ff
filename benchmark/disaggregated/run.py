"""``bench_colocate.py --disaggregated``: what is trained on the decode server of a pair, and what
it costs the requests that go through it.

The serve-only pair has SGLang's plain decode server; the other has one that trains.  Both take the
same pieces of the conversation trace, by turns, at the rate at which the plain decode server is so
many per cent busy.  Targets are of the time per output token behind the first, as the client sees
it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from colocate import noise
from colocate.calibrate import offered, served
from common import jobs
from common import report as bench_report
from common.replay import Sent, published, send
from disaggregated import judge, page
from disaggregated.pairs import Pairs
from disaggregated.plan import HARLI, SERVE, Scale, mean_output, piece
from sglang_harli.simulation.traces import Trace, TraceRequest

FLAGS = ("--max-total-tokens", "32768", "--max-running-requests", "32", "--num-reserved-decode-tokens", "128")
ROUNDS = 3  # of the calibration
SETTLE_S, WAIT_S = 1.0, 120.0
BUSY, MULTIPLE = 50, 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--disaggregated")
    add = group.add_argument
    add(
        "--disaggregated",
        action="store_true",
        help="a prefill/decode pair instead, on the conversation trace",
    )
    add("--trace", type=Path, help="the published trace's file (default: one of the same statistics)")


def defaults(options: argparse.Namespace) -> None:
    quick = options.quick
    options.repetitions = options.repetitions or (2 if quick else 8)
    options.requests = options.requests or (24 if quick else 60)
    options.seconds = options.seconds or (5.0 if quick else 10.0)
    options.load = int((options.loads or str(BUSY)).split(",")[-1])
    options.multiple = float((options.targets or str(MULTIPLE)).split(",")[0])


def seen(sent: Sent) -> dict[str, Any]:
    """Times of each request, milliseconds; None: it failed or did not end in time (pure)."""
    return {
        "tpots_ms": [None if one is None else round(one.tpot_s * 1e3, 3) for one in sent.seen],
        "ttfts_ms": [None if one is None else round(one.ttft_s * 1e3, 3) for one in sent.seen],
        "failures": sent.failures + ["not ended in time"] * (sent.seen.count(None) - len(sent.failures)),
        "seconds": round(sent.seconds, 3),
    }


class Bench:
    """Cells of one run; ``vocab``: token ids of prompts are below it."""

    def __init__(self, pairs: Pairs, watch: noise.Watch, vocab: int, seconds: float) -> None:
        self._pairs, self._watch, self._vocab, self._seconds = pairs, watch, vocab, seconds

    def measure(self, mode: str, repetition: int, requests: list[TraceRequest]) -> dict[str, Any]:
        """Send the requests to the pair of this mode, which runs alone meanwhile."""
        self._watch.begin()
        with self._pairs.running(mode) as pair:
            time.sleep(SETTLE_S)
            work = functools.partial(send, pair.url, requests, self._vocab, WAIT_S)
            if mode == SERVE:
                sent, found = work(), {}
                found["busy"] = self._pairs.busy(sent.began_s, sent.ended_s)
            else:
                sent, found = self._training(work)
            found["pss_bytes"] = self._pairs.pss_bytes(mode)
        disturbed = self._watch.end()
        base = {"mode": mode, "load": judge.LOAD, "setting": judge.SETTING, "repetition": repetition}
        return {**base, **seen(sent), **found, "noise": disturbed, "disturbed": disturbed["why"]}

    def _training(self, work: Any) -> tuple[Sent, dict[str, Any]]:
        """The same beside training, with training alone right before and after."""
        alone = functools.partial(time.sleep, self._seconds)
        with self._pairs.client() as client:
            job = self._pairs.job
            _, before = jobs.trained(client, job, alone)
            sent, rate = jobs.trained(client, job, work)
            _, after = jobs.trained(client, job, alone)
            status = client.status()
        figures = {
            name: (status.serving or {}).get(name)
            for name in ("prediction", "slo_attainment", "disaggregation")
        }
        return sent, {
            "tokens_per_s": rate,
            "train_only_tokens_per_s": (before + after) / 2,
            "status": figures,
            "pool": {name: (status.pool or {}).get(name) for name in ("backing", "reclaims", "moves")},
        }


def calibrated(bench: Bench, trace: Trace, options: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The rate at which the serve-only decode server is so busy, and its median TPOT there."""
    first = piece(trace, 0, 6, 0.5, scale)
    alone = [t for t in bench.measure(SERVE, 0, first)["tpots_ms"] if t is not None]
    if not alone:
        raise SystemExit("no request went through the serve-only pair")
    rate = offered(options.load / 100, statistics.median(alone) / 1e3 * mean_output(first))
    measured, tpots_ms = [], []
    for number in range(1, ROUNDS + 1):
        requests = piece(trace, number, options.requests, rate, scale)
        cell = bench.measure(SERVE, -number, requests)
        measured.append((round(rate, 3), round(cell["busy"], 3)))
        tpots_ms += [t for t in cell["tpots_ms"] if t is not None]
        rate = offered(options.load / 100, served(cell["busy"], len(requests) / cell["seconds"]))
        print(f"calibrating: {measured[-1]}", flush=True)
    return {"rate": rate, "tpot_ms": statistics.median(tpots_ms), "measured": measured}


def line(cell: dict[str, Any]) -> str:
    """A cell in one line, for the terminal."""
    ended = [t for t in cell["tpots_ms"] if t is not None]
    text = f"[{cell['repetition']}] {cell['mode']}: {len(ended)} of {len(cell['tpots_ms'])} requests in {cell['seconds']:.0f} s"
    text += f", TPOT {statistics.median(ended):.1f} ms" if ended else ""
    text += (
        f", busy {cell['busy']:.0%}" if "busy" in cell else f", {cell['tokens_per_s']:.0f} finetune tokens/s"
    )
    return text + (f" (disturbed: {cell['disturbed']})" if cell["disturbed"] else "")


def run(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    began, scale = time.monotonic(), Scale()
    trace = published(options.trace, duration_s=3600.0, mean_batch=8.0, tpot_s=0.04)
    watch = noise.Watch(noise.Pieces())
    with Pairs(model, folder, (*FLAGS, *options.flags.split())) as pairs:
        pairs.start()
        print(f"both pairs are up after {time.monotonic() - began:.0f} s", flush=True)
        bench = Bench(pairs, watch, AutoConfig.from_pretrained(model).vocab_size, options.seconds)
        calibration = calibrated(bench, trace, options, scale)
        target_ms = options.multiple * calibration["tpot_ms"]
        watch.calibrated()
        results: dict[str, Any] = {
            "trace": trace.name,
            "load": options.load,
            "multiple": options.multiple,
            "calibration": calibration,
            "target_ms": target_ms,
            "noise_rule": noise.RULE,
            "cells": [],
        }
        with pairs.running(HARLI), pairs.client() as client:
            answer = client.set(tpot_slo_ms=target_ms)
            if answer.outcome != "applied":
                raise SystemExit(f"the target was not applied: {answer.outcome} {answer.message}")
        # discarded: our estimates settle within some hundred steps
        bench.measure(HARLI, 0, piece(trace, ROUNDS + 1, options.requests, calibration["rate"], scale))
        for repetition in range(1, options.repetitions + 1):
            requests = piece(trace, ROUNDS + 1 + repetition, options.requests, calibration["rate"], scale)
            modes = (SERVE, HARLI) if repetition % 2 else (HARLI, SERVE)
            for mode in modes:
                cell = bench.measure(mode, repetition, requests)
                if cell["disturbed"]:
                    print(line(cell), flush=True)
                    cell = bench.measure(mode, repetition, requests)
                results["cells"].append(cell)
                print(line(cell), flush=True)
    results["seconds"] = round(time.monotonic() - began)
    return results


def main(options: argparse.Namespace) -> int:
    from sglang_harli.tools.make_model import make_model

    defaults(options)
    with tempfile.TemporaryDirectory(prefix="harli-pairs-", ignore_cleanup_errors=True) as name:
        model = Path(name) / "model"
        make_model(model, "llama", size=options.model_size, dtype="bfloat16", seconds=0)
        results = run(options, model, Path(name))
    rows, problems = judge.rows(results), judge.problems(results)
    text = page.page(results, rows, problems)
    if options.json is not None:
        document = {"results": results, "meta_info": bench_report.meta_info()}
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
    written = bench_report.write(
        "disaggregated-quick" if options.quick else "disaggregated",
        "cpu",
        question="How much does the decode server of a prefill/decode pair train, and do requests keep their target?",
        settings={
            "model": f"Llama, {options.model_size}, bf16, random weights",
            "servers": " ".join(FLAGS),
            "transport": "mooncake over TCP on loopback, SGLang's router before both servers",
            "trace": f"{results['trace']}: prompts by 1/8, outputs by 1/4, at most 1024 tokens; {options.requests} requests a cell",
            "job": "LoRA rank 16 on all linear layers, micro-batches of 4 rows of up to 128 tokens",
            "cores": "the decode server's scheduler has cores of its own, everything else shares the others",
        },
        results=results,
        table=text,
        not_shown=(
            "Two machines, RDMA, a GPU, adapters in the batch, several servers on either side, and other models and lengths. "
            "The time to the first token is the prefill server's, which shares its core with the router and the load client."
        ),
        folder=options.results,
    )
    print(text)
    print(f"written: {written} ({results['seconds']} s)")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0

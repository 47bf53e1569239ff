"""Part 4: what do requests lose and what does training gain, with an 8B model, at three rates of a
conversation trace?

Serve-only is plain SGLang without any plugin; both servers stand on the device together, with KV
caches of the same size, and take the same requests one after the other.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from common import jobs, servers
from common import load as bench_load
from common.servers import Server
from gpu import serving
from gpu.page import Page
from gpu.replay import Targets, replay, requests_for
from gpu.server_part import SECOND
from sglang_harli import FinetuneClient

KV_TOKENS, DRY_KV_TOKENS = 196_608, 16_384
TARGET_MS = 30.0  # the TPOT target where none is given
LEAST_WINDOW_S, LONGEST_WINDOW_S = 15.0, 45.0
BEHIND_S = 12.0  # what a window takes besides: requests that are under way, settling
DECODE = "decode"


def run(page: Page, options: Any) -> None:
    """Start both, calibrate nothing: the rates and the target are given; measure rate by rate."""
    with tempfile.TemporaryDirectory(prefix="harli-check-") as name:
        folder = Path(name)
        size = options.size or ("tiny" if page.dry else "8b")
        model, vocab = serving.model_of(folder, size)
        page.settings["model"] = f"Llama of {size}, bf16, random weights (--load-format dummy)"
        data = jobs.write_data(folder / "data.jsonl", words=(4, 12) if page.dry else (60, 200))
        limit = ["--max-total-tokens", str(DRY_KV_TOKENS if page.dry else KV_TOKENS)]
        target_ms = options.tpot_slo_ms or (500.0 if page.dry else TARGET_MS)
        sides: dict[str, Server] = {}
        up = page.measure("start", functools.partial(_start, page, options, model, limit, target_ms, sides))
        if up is None:
            return
        with FinetuneClient(sides["ours"].endpoint) as client:
            _rates(page, options, sides, client, data, vocab, target_ms)


def _start(
    page: Page, options: Any, model: Path, limit: list[str], target_ms: float, sides: dict[str, Server]
) -> dict[str, Any]:
    """One behind the other on a GPU: each takes its share of the memory that is free then."""
    first = [] if page.dry else ["--mem-fraction-static", "0.45"]
    second = [] if page.dry else ["--mem-fraction-static", str(SECOND)]
    sides["plain"] = serving.start(page, options, model, "plain", *limit, *first, plain=True)
    found = {}
    if not page.dry:
        found["plain_s"] = serving.wait_ready(page, sides["plain"])
    target = ["--harli-tpot-slo-ms", str(target_ms)]
    sides["ours"] = serving.start(page, options, model, "ours", *limit, *second, *target)
    for name, server in sides.items():
        if f"{name}_s" not in found:
            found[f"{name}_s"] = serving.wait_ready(page, server)
    limits = servers.limits_of(sides["ours"])
    page.settings |= {
        "attention": limits["attention_backend"],
        "sampling": limits["sampling_backend"],
        "KV cache": f"{limits['max_total_num_tokens']} tokens",
        "target": f"{target_ms:g} ms per output token",
    }
    return found


def _rates(
    page: Page,
    options: Any,
    sides: dict[str, Server],
    client: FinetuneClient,
    data: Path,
    vocab: int,
    target_ms: float,
) -> None:
    rates = [0.5] if page.dry else [float(rate) for rate in options.rates.split(",")]
    for server in sides.values():  # discarded: kernels of first use, and caches
        bench_load.run(server.url, bench_load.Load(2, 32, 8, vocab), 0.5 if page.dry else 4.0)
    job = page.measure("training alone", functools.partial(_training_alone, page, client, data), needs_s=2)
    if job is None:
        return
    for number, rate in enumerate(rates):
        left = page.left_s / (2 * (len(rates) - number)) - BEHIND_S
        window_s = 4.0 if page.dry else min(LONGEST_WINDOW_S, options.seconds or left)
        needs_s = 0.0 if page.dry else 2 * (LEAST_WINDOW_S + BEHIND_S)
        name, requests = requests_for(
            options.trace,
            mean_batch=rate,
            tpot_s=target_ms / 1e3,
            seconds=window_s,
            most_tokens=96 if page.dry else 8000,
        )
        page.settings["trace"] = name
        work = functools.partial(
            _rate, sides, client, job["job"], requests, vocab, target_ms, job["tokens_per_s"]
        )
        page.measure(f"rate {rate:g}", work, needs_s=needs_s)
    page.measure("predictor", functools.partial(_predictor, page.sections))
    client.cancel(job["job"])


def _training_alone(page: Page, client: FinetuneClient, data: Path) -> dict[str, Any]:
    job = jobs.train(client, data, batch_size=2 if page.dry else 16)
    window_s = 1.0 if page.dry else 10.0
    _, rate = jobs.trained(client, job, functools.partial(time.sleep, window_s))
    return {"job": job, "tokens_per_s": rate}


def _rate(
    sides: dict[str, Server],
    client: FinetuneClient,
    job: str,
    requests: list[Any],
    vocab: int,
    target_ms: float,
    train_only: float,
) -> dict[str, Any]:
    """The same requests to plain SGLang while our job is paused, and to ours while it trains."""
    targets = Targets(target_ms / 1e3)
    client.pause(job)
    jobs.wait(client, job, lambda state: state.status.value == "paused")
    alone = replay(sides["plain"].url, requests, vocab, targets)
    client.resume(job)
    jobs.wait(client, job, lambda state: state.status.value == "running")
    servers.post(sides["ours"], "/flush_cache", {})
    together, rate = jobs.trained(
        client, job, functools.partial(replay, sides["ours"].url, requests, vocab, targets)
    )
    found = serving.status(client)
    step_ms = alone.get("tpot_ms", {}).get(50, 0.0)
    return {
        "requests": len(requests),
        "serve_only": alone,
        "together": together,
        "finetune_tokens_per_s": rate,
        "harvest": rate / train_only if train_only else None,
        "reclaim_of_step": serving.reclaim_of_step(found, step_ms),
        "status": found,
    }


def _predictor(sections: dict[str, Any]) -> dict[str, Any]:
    """The mean error of the latest 200 predicted decode steps at the end of each rate: the largest
    of them; the least share of all steps that kept their upper bound.

    RuntimeError: no step was predicted.
    """
    rates = [found for name, found in sections.items() if name.startswith("rate ")]
    figures = [one for found in rates for one in found["status"]["prediction"] if one["phase"] == DECODE]
    if not figures:
        raise RuntimeError("no rate was measured, or the predictor has no figures of decode steps")
    return {
        "error": max(one["mape"] for one in figures),
        "within the upper bound": min(one["total_coverage"] for one in figures),
        "steps": max(one["steps"] for one in figures),
    }

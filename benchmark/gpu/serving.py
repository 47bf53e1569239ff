"""Servers, jobs and windows of load, as parts 3 and 4 use them."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import load as bench_load
from common import servers
from common.servers import Server
from gpu.page import Page
from sglang_harli import FinetuneClient

START_LIMIT_S = 240.0
JOB_LIMIT_S = 120.0
DATA_ROWS = 512
GREEDY_TOKENS = 32
WORDS = ("river", "stone", "seven", "lantern", "harbour", "quiet", "north", "copper", "window", "garden")


def model_of(folder: Path, size: str) -> tuple[Path, int]:
    """A Llama's configuration and tokenizer, whose weights the server makes at random; and its
    vocabulary."""
    from sglang_harli.tools.make_model import make_model

    path = folder / f"model-{size}"
    made = make_model(path, "llama", size=size, dtype="bfloat16", weights=False)
    return path, made["vocab_size"]


def write_data(path: Path, rows: int = DATA_ROWS, words: tuple[int, int] = (8, 60)) -> Path:
    """Question and answer pairs of varied length, from a seed."""
    rng = random.Random(0)
    with path.open("w") as out:
        for n in range(rows):
            asked = f"Number {n}: what follows " + " ".join(rng.choices(WORDS, k=rng.randint(*words))) + "?"
            answer = " ".join(rng.choices(WORDS, k=rng.randint(*words)))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return path


def start(
    page: Page,
    options: Any,
    model: Path,
    name: str,
    *flags: str,
    plain: bool = False,
    env: dict[str, str] | None = None,
) -> Server:
    """A server that is not up yet; the page's end ends it, and keeps its log beside the page."""
    words = ["--load-format", "dummy", "--random-seed", "1", *flags, *options.flags.split()]
    if not page.dry:
        words += ["--attention-backend", options.attention_backend]
        words += ["--sampling-backend", options.sampling_backend]
    elif not plain:
        words += ["--harli-warm-up", "on"]  # by itself it is for GPUs
    launcher, device = "plain" if plain else "harli", "cpu" if page.dry else "cuda"
    server = servers.start_server(model, *words, launcher=launcher, device=device, env=env)

    def end() -> None:
        page.folder.mkdir(parents=True, exist_ok=True)
        if server.log_path.exists():
            shutil.copy(server.log_path, page.folder / f"{page.name}-{name}.log")
        server.kill()

    page.at_end(end)
    return server


def wait_ready(page: Page, server: Server) -> float:
    """Seconds until it was healthy; RuntimeError, with the end of its log: it was not in time."""
    limit_s = page.left_s if page.dry else min(START_LIMIT_S, page.left_s)
    return round(server.wait_ready(max(limit_s, 1.0) + time.monotonic() - server.started_at), 1)


# ---------------------------------------------------------------- jobs
def train(client: FinetuneClient, data: Path, **hyperparameters: Any) -> str:
    """A job that trains until it is cancelled; its id, once three steps are done."""
    wanted: dict[str, Any] = {"n_epochs": 10_000, "batch_size": 8, "checkpoint_every": 0} | hyperparameters
    job = client.submit(data, suffix="check", **wanted).id
    wait(client, job, lambda state: state.step >= 3)
    return job


def wait(
    client: FinetuneClient, job: str, enough: Callable[[Any], bool], limit_s: float = JOB_LIMIT_S
) -> Any:
    """Poll until ``enough``; RuntimeError when the job ends otherwise or takes too long."""
    end = time.monotonic() + limit_s
    while True:
        state = client.get(job)
        if enough(state):
            return state
        if state.status.value in ("failed", "cancelled") or time.monotonic() > end:
            raise RuntimeError(f"job {job} is {state.status.value} at step {state.step}: {state.error}")
        time.sleep(0.1)


def cancel(client: FinetuneClient, job: str) -> None:
    """Returns when it is over and its memory given back."""
    client.cancel(job)
    end = time.monotonic() + JOB_LIMIT_S
    while not client.get(job).status.final and time.monotonic() < end:
        time.sleep(0.1)


def trained(client: FinetuneClient, job: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and the finetune tokens per second over the same time."""
    tokens, began = client.get(job).trained_tokens, time.monotonic()
    found = work()
    seconds = time.monotonic() - began
    return found, round((client.get(job).trained_tokens - tokens) / seconds, 1)


def finish_one(server: Server, client: FinetuneClient, data: Path) -> dict[str, Any]:
    """A short job to its end; whether its adapter is listed and answers under its name."""
    few = data.with_name("few.jsonl")
    few.write_text("".join(line + "\n" for line in data.read_text().splitlines()[:16]))
    job = client.submit(few, suffix="few", n_epochs=1, batch_size=8).id
    name = wait(client, job, lambda state: state.status.value == "succeeded").fine_tuned_model
    listed = name in [model["id"] for model in servers.get(server, "/v1/models")["data"]]
    messages = [{"role": "user", "content": "What follows the river?"}]
    body = {"model": name, "messages": messages, "max_tokens": 8}
    answer = servers.post(server, "/v1/chat/completions", body)
    return {"name": name, "answers": listed and answer["model"] == name}


# ---------------------------------------------------------------- load
def greedy(server: Server, vocab: int, prompts: int) -> list[list[int]]:
    """Output ids of fixed prompts, one request at a time, from an empty prefix cache: on a GPU the
    batch's composition changes the rounding."""
    servers.post(server, "/flush_cache", {})
    rng = random.Random("greedy")
    made = [[rng.randrange(10, vocab) for _ in range(64)] for _ in range(prompts)]
    return [bench_load.generate(server.url, prompt, GREEDY_TOKENS) for prompt in made]


def status(client: FinetuneClient) -> dict[str, Any]:
    """Backing, predictor, reclaims and what warm-up came to, of ``harli status``."""
    answer = client.status()
    serving, pool = answer.serving or {}, answer.pool or {}
    predicted = serving.get("prediction") or {}
    return {
        "prediction": [{"phase": phase, **figures} for phase, figures in predicted.items()],
        "slo_attainment": serving.get("slo_attainment"),
        "pool": {name: pool.get(name) for name in ("backing", "reclaims", "reclaim_ms", "moves", "spills")},
    }


def reclaim_of_step(found: dict[str, Any], step_ms: float) -> float | None:
    """The median reclaim, of a decode step; None: there was none."""
    pool = found["pool"]
    if not pool.get("reclaims") or not step_ms:
        return None
    return pool["reclaim_ms"]["p50"] / step_ms

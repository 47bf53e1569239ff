"""Servers and windows of load, as parts 3 and 4 use them."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from common import jobs, servers
from common import load as bench_load
from common.servers import Server
from gpu.page import Page
from sglang_harli import FinetuneClient

START_LIMIT_S = 240.0
GREEDY_TOKENS = 32


def model_of(folder: Path, size: str) -> tuple[Path, int]:
    """A Llama's configuration and tokenizer, whose weights the server makes at random; and its
    vocabulary."""
    from sglang_harli.tools.make_model import make_model

    path = folder / f"model-{size}"
    made = make_model(path, "llama", size=size, dtype="bfloat16", weights=False)
    return path, made["vocab_size"]


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
def finish_one(server: Server, client: FinetuneClient, data: Path) -> dict[str, Any]:
    """A short job to its end; whether its adapter is listed and answers under its name."""
    few = data.with_name("few.jsonl")
    few.write_text("".join(line + "\n" for line in data.read_text().splitlines()[:16]))
    job = client.submit(few, suffix="few", n_epochs=1, batch_size=8).id
    name = jobs.wait(client, job, lambda state: state.status.value == "succeeded").fine_tuned_model
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

"""Jobs that train while something is measured."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_harli import FinetuneClient

LIMIT_S = 120.0
DATA_ROWS = 512
WORDS = ("river", "stone", "seven", "lantern", "harbour", "quiet", "north", "copper", "window", "garden")


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


def train(client: FinetuneClient, data: Path, **hyperparameters: Any) -> str:
    """A job that trains until it is cancelled; its id, once three steps are done."""
    wanted: dict[str, Any] = {"n_epochs": 10_000, "batch_size": 8, "checkpoint_every": 0} | hyperparameters
    job = client.submit(data, suffix="check", **wanted).id
    wait(client, job, lambda state: state.step >= 3)
    return job


def wait(client: FinetuneClient, job: str, enough: Callable[[Any], bool], limit_s: float = LIMIT_S) -> Any:
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
    end = time.monotonic() + LIMIT_S
    while not client.get(job).status.final and time.monotonic() < end:
        time.sleep(0.1)


def trained(client: FinetuneClient, job: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and the finetune tokens per second over the same time."""
    tokens, began = client.get(job).trained_tokens, time.monotonic()
    found = work()
    seconds = time.monotonic() - began
    return found, round((client.get(job).trained_tokens - tokens) / seconds, 1)

"""What our server shows of itself, as the co-location benchmark reads it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from colocate import busy
from sglang_harli import FinetuneClient

JOB_LIMIT_S = 180.0
COUNTED = ("quanta", "busy_quanta", "train_s")


def decode_steps(client: FinetuneClient) -> dict[str, Any] | None:
    """The predictor's figures of decode steps; None while the scheduler does not answer, or has run
    none."""
    return ((client.status().serving or {}).get("prediction") or {}).get("decode")


def quanta(client: FinetuneClient) -> dict[str, float]:
    """Quanta since the server's start, those of them beside requests, and the seconds that all
    took; empty without an answer."""
    training = client.status().training or {}
    return {name: training[name] for name in COUNTED if name in training}


def rate(turns: list[tuple[float, float]]) -> float:
    """Tokens per second of all turns together."""
    return round(sum(tokens for tokens, _ in turns) / sum(seconds for _, seconds in turns), 2)


def trained(points: list[tuple[float, float]], began_s: float, ended_s: float) -> dict[str, Any]:
    """Finetune tokens per second in a window; what of a step was done in it is interpolated."""
    tokens = busy.between(points, began_s, ended_s)
    return {"tokens_per_s": round(tokens / (ended_s - began_s), 2), "window_s": ended_s - began_s}


@contextlib.contextmanager
def paused(client: FinetuneClient, job: str) -> Iterator[None]:
    """The job is paused within, and trains again behind it."""
    client.pause(job)
    _wait(client, job, "paused")
    try:
        yield
    finally:
        client.resume(job)
        _wait(client, job, "running")


def _wait(client: FinetuneClient, job: str, status: str) -> None:
    deadline = time.monotonic() + JOB_LIMIT_S
    while (found := client.get(job).status.value) != status:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job is {found}, not {status}, after {JOB_LIMIT_S:.0f} s")
        time.sleep(0.1)

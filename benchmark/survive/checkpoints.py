"""Gaps between tokens while a state of 100 MB is copied out and written: the soak's first part."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import servers
from sglang_harli import AsyncFinetuneClient
from sglang_harli.protocol.public import Event
from survive.traffic import Traffic

RANK = 112  # of the 25M model's state of 100 MB: adapter and two moments, fp32
TARGET_MS = 60.0  # of a token, and the cap of a single gap
EVERY_STEPS = 2
SAVES = 12


async def run(model: Path, folder: Path) -> dict[str, Any]:
    """Train and save under two streams until ``SAVES`` checkpoints are written."""
    flags = ("--max-lora-rank", str(RANK), "--harli-tpot-slo-ms", f"{TARGET_MS:g}")
    server = servers.start_server(
        model, *flags, "--harli-max-itl-ms", f"{TARGET_MS:g}", run_dir=folder / "checkpoint-runs"
    )
    try:
        await asyncio.to_thread(server.wait_ready)
        async with AsyncFinetuneClient(server.endpoint) as client:
            return await _measure(server, client)
    finally:
        server.kill()


async def _measure(server: Any, client: AsyncFinetuneClient) -> dict[str, Any]:
    stop = asyncio.Event()
    traffic = Traffic(server.url, ["Tell me of the sea."], streams=2, seed=0, tokens=(100, 200), pause_s=0.2)
    sending = asyncio.create_task(traffic.run(stop))
    rows = [{"prompt": f"Count to {n}: ", "completion": f"{n} is the number."} for n in range(64)]
    job = await client.submit(
        rows, lora_r=RANK, batch_size=2, n_epochs=1000, checkpoint_every=EVERY_STEPS, learning_rate=1e-4
    )
    saves = 0
    async for event in client.events(job.id, follow=True):
        saves += event.type == "checkpoint_saved"
        if saves == SAVES:
            break
    state = max(Path(job.run_dir or "").glob("checkpoints/step-*/state.safetensors"))
    state_bytes = state.stat().st_size
    await client.cancel(job.id)
    stop.set()
    await sending
    events = [event async for event in client.events(job.id)]
    gaps = [gap for seen in traffic.seen for gap in seen.gaps]
    errors = [seen.error for seen in traffic.seen if seen.error]
    return summary(events, gaps) | {"state_mb": round(state_bytes / 1e6, 1), "errors": errors}


def windows(events: Sequence[Event]) -> list[tuple[float, float]]:
    """(from, to) of each checkpoint: from the step that it holds to the message that it is durable
    (pure)."""
    steps = {e.data["step"]: e.created_at for e in events if e.type == "step_metrics"}
    return [
        (steps[e.data["step"]], e.created_at)
        for e in events
        if e.type == "checkpoint_saved" and e.data["step"] in steps
    ]


def summary(events: Sequence[Event], gaps: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Gaps that overlap a checkpoint and those that do not, in milliseconds (pure).

    Args:
        gaps: (end, seconds) of each, on the clock of the events.
    """
    spans = windows(events)
    trained = [e.created_at for e in events if e.type == "step_metrics"]
    during, beside = [], []
    for end, seconds in gaps:
        if not trained or not trained[0] <= end <= trained[-1]:
            continue
        saving = any(end - seconds <= to and end >= since for since, to in spans)
        (during if saving else beside).append(1000 * seconds)
    return {
        "target_ms": TARGET_MS,
        "checkpoints": len(spans),
        "save_s": [round(to - since, 2) for since, to in spans],
        "during": quantiles(during),
        "beside": quantiles(beside),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    at = {q: ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.9, 0.99)}
    found = {"p50": at[0.5], "p90": at[0.9], "p99": at[0.99], "max": ordered[-1]}
    return {"count": len(ordered), **{name: round(value, 1) for name, value in found.items()}}

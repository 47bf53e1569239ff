"""A run directory with many queued jobs and events: jobs as the routes make them, and more events
of steps written by the service's own store while the service is down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec

from sglang_harli.protocol.public import Event
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.store import STORE_FILE, JobStore, sqlite_url

ROWS = b'{"prompt": "how far?", "completion": "7 km"}\n' * 16
WAIT_S = 600.0
TOGETHER = 50  # jobs of a transaction


def submit(url: str, model: str, count: int, **hyperparameters: Any) -> None:
    """So many jobs of one file; returns when each is queued."""
    with httpx.Client(base_url=f"{url}/v1", timeout=120) as client:
        files = {"file": ("rows.jsonl", ROWS)}
        file = (
            client.post("/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()["id"]
        )
        body = {"model": model, "training_file": file, "metadata": {"team": "bench"}}
        body["harli"] = {"hyperparameters": hyperparameters}

        def one(_number: int) -> None:
            client.post("/fine_tuning/jobs", json=body).raise_for_status()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(one, range(count)))
        end = time.monotonic() + WAIT_S
        while (left := _unready(client, count)) > 0:
            if time.monotonic() > end:
                raise SystemExit(f"{left} of {count} jobs are not queued after {WAIT_S:g} s")
            time.sleep(0.5)


def _unready(client: httpx.Client, count: int) -> int:
    jobs: list[dict[str, Any]] = []
    while True:
        after = {"after": jobs[-1]["id"]} if jobs else {}
        page = client.get("/fine_tuning/jobs", params={"limit": 1000, **after}).raise_for_status().json()
        jobs += page["data"]
        if not page["has_more"]:
            return count - sum(job["status"] == "queued" for job in jobs)


def add_events(run_dir: Path, wanted: int) -> int:
    """Have the jobs so many events together; how many there are.  No service may run there."""
    store = JobStore(sqlite_url(run_dir / STORE_FILE))
    try:
        records = store.jobs()
        each = -(-wanted // len(records))
        for start in range(0, len(records), TOGETHER):
            some = records[start : start + TOGETHER]
            store.write(
                [msgspec.structs.replace(record, last_event=max(each, record.last_event)) for record in some],
                (event for record in some for event in _events(record, each)),
            )
        return sum(max(each, record.last_event) for record in records)
    finally:
        store.close()


def _events(record: JobRecord, last: int) -> Iterator[Event]:
    for number in range(record.last_event + 1, last + 1):
        data = {
            "step": number,
            "loss": 1.0,
            "learning_rate": 2e-4,
            "grad_norm": 1.0,
            "tokens": 64,
            "seconds": 0.1,
        }
        yield Event(
            id=number,
            job=record.id,
            created_at=record.created_at + number,
            level="info",
            type="step_metrics",
            message=f"step {number}: loss 1.0",
            data=data,
        )

"""A clock that jumps moves the stamps that people read, and nothing else."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_harli.cli import view
from sglang_harli.core import JobStatus
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.endpoint.subscriptions import Subscriptions
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import JobStore, sqlite_url
from sglang_harli.service.jobs.transitions import JobRecord

METRICS = {"loss": 2.0, "learning_rate": 1e-4, "seconds": 0.1, "tokens": 10, "step": 1}


@pytest.fixture
def store(tmp_path: Path):
    made = JobStore(sqlite_url(tmp_path / "harli.db"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def jumping_clock(monkeypatch):
    """Every look at the clock of the wall finds it years off, forwards or back."""
    rng, real = random.Random(1), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e8, 1e8))


def new(registry: JobRegistry) -> JobRecord:
    job = registry.new_id()
    (registry.run_dir / job).mkdir()
    return JobRecord(
        id=job,
        number=registry.next_number(),
        created_at=time.time(),
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(),
        model="m",
        adapter_name=f"m-{job}",
        total_steps=3,
        data={"rows": 4},
    )


def test_order_of_jobs_and_events_is_by_number(store, tmp_path):
    async def work():
        registry = JobRegistry(store, tmp_path)
        made = [new(registry) for _ in range(20)]
        for record in made:
            await registry.add(transitions.created(record, "4 rows"))
        assert [r.id for r in registry.newest()] == [r.id for r in reversed(made)]
        order = []
        while (record := registry.next_queued()) is not None:
            order.append(record.id)
            registry.apply(transitions.start(record, time.time()))
            registry.apply(transitions.step_done(registry.get(record.id), 1, 10, METRICS), urgent=False)
            await registry.apply(transitions.fail(registry.get(record.id), "code", "text", time.time()))
        assert order == [r.id for r in made]
        for job in order:
            events = store.events(job, 0, 100)
            assert [e.id for e in events] == list(range(1, len(events) + 1))
            assert events[-1].type == "failed"
        assert len({events[i].created_at for i in range(len(events))}) == len(events)  # the clock did jump
        shown = list(view.job_lines(registry.public(registry.get(order[0]))))
        assert any(line.startswith("finished:") for line in shown)
        registry.journal.close()

    asyncio.run(work())


def test_leases_of_followers_and_waiting_do_not_look_at_it(store, tmp_path):
    async def work():
        registry = JobRegistry(store, tmp_path)
        record = new(registry)
        await registry.add(transitions.created(record, "4 rows"))
        got = []
        with ThreadPoolExecutor(1) as readers:
            followers = Subscriptions(store, readers, lambda route, request, event: not got.append(event.id))
            registry.committed.append(followers.committed)
            task = asyncio.create_task(followers.run())
            followers.follow((b"a",), "1", record.id, 0)
            waiting = asyncio.create_task(
                registry.wait_until(record.id, lambda r: r.status == "paused", 20.0)
            )
            await asyncio.sleep(0)
            await registry.apply(transitions.ask_pause(registry.get(record.id)))
            assert (await waiting).status == "paused"
            while len(got) < 4:
                await asyncio.sleep(0.01)
            assert got == [1, 2, 3, 4] and len(followers) == 1
            task.cancel()
        registry.journal.close()

    asyncio.run(work())

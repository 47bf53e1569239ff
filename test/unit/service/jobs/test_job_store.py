"""The store, its writer and the readable copies: durable in order, and whole after a crash."""

from __future__ import annotations

import asyncio
import json
import re

import msgspec
import orjson
import pytest

from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError, NotFoundError
from sglang_harli.protocol.public import Event
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.folder import JobMirror
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import JobStore, sqlite_url
from support.service.job_records import METRICS, record


def event(number: int, kind: str = "warning", **data) -> Event:
    return Event(
        id=number, job="ftjob-a", created_at=1.0, level="info", type=kind, message=f"no {number}", data=data
    )


@pytest.fixture
def store(tmp_path):
    made = JobStore(sqlite_url(tmp_path / "harli.db"))
    yield made
    made.close()


def test_jobs_come_back_in_the_order_of_their_creation(store, tmp_path):
    second, first = record(id="b", number=2), record(id="a", number=1, idempotency_key="k")
    store.write([second, first])
    store.write([msgspec.structs.replace(first, status=JobStatus.PAUSED)])
    again = JobStore(sqlite_url(tmp_path / "harli.db"))
    assert [(r.id, r.status) for r in again.jobs()] == [("a", "paused"), ("b", "queued")]
    again.close()


def test_write_ahead_mode(store, tmp_path):
    store.write(settings={"x": "1"})
    assert (tmp_path / "harli.db-wal").exists()


def test_events_from_a_cursor(store):
    store.write(events=[event(n) for n in range(1, 8)])
    store.write(events=[event(7)])  # repeating a write changes nothing
    assert [e.id for e in store.events("ftjob-a", after=2, limit=3)] == [3, 4, 5]
    assert store.events("another", after=0, limit=10) == []


def test_a_store_of_another_version_is_refused(store, tmp_path):
    store.write(settings={"schema": "99"})
    with pytest.raises(HarliError, match="schema 99"):
        JobStore(sqlite_url(tmp_path / "harli.db"))


@pytest.mark.parametrize("name", ["what?mode=memory", "50%", "a#b", "%2F", "ü b", "x;y&z"])
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    made = JobStore(sqlite_url(folder / "harli.db"))
    made.write([record()])
    made.close()
    assert (folder / "harli.db").is_file()
    again = JobStore(sqlite_url(folder / "harli.db"))
    assert len(again.jobs()) == 1
    again.close()
    (folder / "bad.db").write_bytes(b"not a database" * 100)
    with pytest.raises(HarliError, match=re.escape(f"the job store {folder}/bad.db cannot be opened")):
        JobStore(sqlite_url(folder / "bad.db"))


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "bad.db").write_bytes(b"not a database" * 100)
    with pytest.raises(HarliError, match="cannot be opened"):
        JobStore(sqlite_url(tmp_path / "bad.db"))


class TestMirror:
    def lines(self, path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_both_files_follow_the_store(self, store, tmp_path):
        (tmp_path / "ftjob-a").mkdir()
        store.write(events=[event(1), event(2, "step_metrics", step=1, loss=2.5), event(3)])
        mirror = JobMirror(tmp_path, store.events)
        mirror.events("ftjob-a", 3)
        assert [e["id"] for e in self.lines(tmp_path / "ftjob-a/events.jsonl")] == [1, 2, 3]
        assert self.lines(tmp_path / "ftjob-a/metrics.jsonl") == [
            {"event": 2, "time": 1.0, "step": 1, "loss": 2.5}
        ]

    @pytest.mark.parametrize("cut", [0, 1, 30, 75])
    def test_a_torn_line_is_completed(self, store, tmp_path, cut):
        folder = tmp_path / "ftjob-a"
        folder.mkdir()
        store.write(events=[event(n, "step_metrics", step=n) for n in range(1, 4)])
        JobMirror(tmp_path, store.events).events("ftjob-a", 3)
        whole = (folder / "events.jsonl").read_bytes(), (folder / "metrics.jsonl").read_bytes()
        for name, content in zip(("events.jsonl", "metrics.jsonl"), whole, strict=True):
            (folder / name).write_bytes(content[: len(content) - cut])
        store.write(events=[event(4, "step_metrics", step=4)])
        JobMirror(tmp_path, store.events).events("ftjob-a", 4)
        assert [e["id"] for e in self.lines(folder / "events.jsonl")] == [1, 2, 3, 4]
        assert [e["event"] for e in self.lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]


class TestWaits:
    def run(self, work):
        return asyncio.run(work())

    def test_what_was_awaited_is_on_disk(self, store, tmp_path):
        async def work():
            registry = JobRegistry(store, tmp_path)
            job = record(id=registry.new_id(), number=registry.next_number(), idempotency_key="key")
            (tmp_path / job.id).mkdir()
            await registry.add(transitions.created(job, "4 rows"))
            await registry.apply(
                transitions.step_done(transitions.start(job, 1.0).record, 1, 10, METRICS), urgent=False
            )
            [stored] = store.jobs()
            assert (stored.step, stored.last_event) == (1, 1)
            assert registry.by_key("key") is not None
            registry.journal.close()
            shown = orjson.loads((tmp_path / job.id / "job.json").read_bytes())
            assert shown["status"] == "running" and shown["step"] == 1

        self.run(work)

    def test_a_restart_queues_what_was_running(self, store, tmp_path):
        async def work():
            first = transitions.start(record(id="ftjob-a", number=1), 1.0).record
            at_four = transitions.checkpoint_saved(first, 4, 40, "every").record
            publishing = transitions.trained(
                transitions.start(record(id="ftjob-b", number=2), 1.0).record
            ).record
            store.write([msgspec.structs.replace(at_four, step=7, trained_tokens=70), publishing])
            registry = JobRegistry(store, tmp_path)
            again = registry.get("ftjob-a")
            assert (again.status, again.step, again.trained_tokens) == (JobStatus.QUEUED, 4, 40)
            assert registry.get("ftjob-b").publishing
            assert registry.next_queued() == again
            assert registry.counts()["queued"] == 1
            with pytest.raises(NotFoundError, match="harli list"):
                registry.get("nobody")
            registry.journal.close()
            assert store.jobs()[0].status == JobStatus.QUEUED

        self.run(work)

    def test_the_queue_is_in_order_of_creation(self, store, tmp_path):
        async def work():
            store.write([record(id=f"ftjob-{n}", number=n, idempotency_key=None) for n in (3, 1, 2)])
            registry = JobRegistry(store, tmp_path)
            registry.apply(transitions.ask_pause(registry.get("ftjob-1")))
            assert registry.next_queued().id == "ftjob-2"
            registry.apply(transitions.ask_resume(registry.get("ftjob-1")))
            assert registry.next_queued().id == "ftjob-1"
            registry.journal.close()

        self.run(work)

    def test_a_job_is_shown_as_over_when_the_store_says_so(self, store, tmp_path):
        async def work():
            store.write([record(id="ftjob-a")])
            registry = JobRegistry(store, tmp_path)
            durable = registry.apply(transitions.fail(registry.get("ftjob-a"), "internal", "a bug", 2.0))
            assert registry.get("ftjob-a").status == JobStatus.FAILED
            assert registry.public(registry.get("ftjob-a")).status == JobStatus.QUEUED
            await durable
            assert registry.public(registry.get("ftjob-a")).status == JobStatus.FAILED
            registry.journal.close()

        self.run(work)

    def test_waiting_for_a_change(self, store, tmp_path):
        async def work():
            store.write([record(id="ftjob-a")])
            registry = JobRegistry(store, tmp_path)
            loop = asyncio.get_running_loop()
            loop.call_later(0.02, lambda: registry.apply(transitions.ask_pause(registry.get("ftjob-a"))))
            paused = await registry.wait_until("ftjob-a", lambda r: r.status == JobStatus.PAUSED, 5.0)
            assert paused.status == JobStatus.PAUSED
            still = await registry.wait_until("ftjob-a", lambda r: r.status == JobStatus.QUEUED, 0.02)
            assert still.status == JobStatus.PAUSED
            registry.journal.close()

        self.run(work)

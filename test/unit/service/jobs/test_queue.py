"""The queue's order, the reason a job waits, and what stays quick with thousands of jobs."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, ProtocolError, StateError
from sglang_harli.names import short_id
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.jobs import disk_usage
from sglang_harli.service.jobs.queue_order import QueueOrder
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import JobStore, sqlite_url
from sglang_harli.service.jobs.transitions import JobRecord
from support.service.scheduler_peer import SchedulerPeer
from support.service.service_fixture import exchange, pairs, until


def job(number: int, **values) -> JobRecord:
    record = JobRecord(
        id=f"ftjob-{number:08d}",
        number=number,
        created_at=1.0,
        status=JobStatus.QUEUED,
        hyperparameters=Hyperparameters(),
        model="m",
        adapter_name=f"m-ft-{number:08d}",
        total_steps=10,
        data={},
    )
    return msgspec.structs.replace(record, **values)


class TestOrder:
    def test_any_sequence_of_changes_ends_as_a_sort_would(self):
        rng = random.Random(3)
        queue, jobs = QueueOrder(), {n: job(n) for n in range(60)}
        for record in jobs.values():
            queue.update(record)
        states = [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED]
        held: set[int] = set()
        for _ in range(3000):
            number = rng.randrange(60)
            if rng.random() < 0.4:
                (held.discard if (free := rng.random() < 0.5) else held.add)(number)
                queue.hold(jobs[number].id, "" if free else f"job {number} waits")
            else:
                jobs[number] = msgspec.structs.replace(
                    jobs[number], status=rng.choice(states), priority=rng.choice((-3, 0, 0, 7))
                )
                queue.update(jobs[number])
            queued = sorted(
                (r for r in jobs.values() if r.status == JobStatus.QUEUED),
                key=lambda r: (-r.priority, r.number),
            )
            ready = [r for r in queued if r.number not in held]
            assert queue.first() == (ready[0].id if ready else None)
            for record in queued:
                if record.number in held:
                    assert queue.reason(record.id) == f"job {record.number} waits"
            if len(ready) > 1:
                assert queue.reason(ready[-1].id).startswith(f"{len(ready) - 1} job")

    def test_a_held_job_keeps_its_place_and_those_behind_do_not_wait(self):
        queue = QueueOrder()
        for number in range(3):
            queue.update(job(number))
        queue.hold(job(0).id, "no room in /dev/shm")
        assert queue.first() == job(1).id
        assert queue.reason(job(0).id) == "no room in /dev/shm"
        assert queue.reason(job(1).id) == "next: about to start"
        queue.update(job(0, status=JobStatus.RUNNING))  # put off: it comes back held
        queue.update(job(0))
        assert queue.first() == job(1).id
        queue.hold(job(0).id, "")
        assert queue.first() == job(0).id

    def test_the_reason_names_the_place_and_the_running_job(self):
        queue = QueueOrder()
        for number in range(4):
            queue.update(job(number))
        assert queue.reason(job(0).id) == "next: about to start"
        running = job(0, status=JobStatus.RUNNING)
        queue.update(running)
        assert queue.reason(running.id) is None
        assert queue.reason(job(1).id) == f"next; job {short_id(running.id)} is running"
        assert queue.reason(job(2).id) == f"1 job ahead; job {short_id(running.id)} is running"
        queue.update(job(3, priority=1))
        assert queue.reason(job(2).id) == f"2 jobs ahead; job {short_id(running.id)} is running"
        queue.update(msgspec.structs.replace(running, publishing=True))
        assert queue.reason(job(2).id) == "2 jobs ahead"


def test_ten_thousand_jobs_are_opened_and_changed_in_constant_steps(tmp_path: Path):
    """No work per change may grow with the number of jobs: counted, not timed."""
    store = JobStore(sqlite_url(tmp_path / "harli.db"))
    store.write([job(n) for n in range(1, 10_001)])

    async def work() -> None:
        registry = JobRegistry(store, tmp_path)
        assert registry.counts()["queued"] == 10_000
        assert registry.next_queued() is registry.get("ftjob-00000001")
        seen = next(registry.newest())
        assert seen.id == "ftjob-00010000"
        assert registry.public(seen).reason == "9999 jobs ahead"
        assert registry.next_number() == 10_001
        registry.journal.close()

    asyncio.run(work())
    store.close()


# ------------------------------------------------------------------ against the real service
def test_higher_priority_first_and_a_changed_one_moves(rig):
    rig.scheduler.hold.clear()
    running = rig.client.submit(pairs(4), n_epochs=1)
    rig.status(running, "running")
    low = rig.client.submit(pairs(4), n_epochs=1, priority=-5)
    plain = rig.client.submit(pairs(4), n_epochs=1)
    high = rig.client.submit(pairs(4), n_epochs=1, priority=5)
    late = rig.client.submit(pairs(4), n_epochs=1)
    assert (low.priority, high.priority) == (-5, 5)
    name = short_id(running.id)
    reasons = [rig.client.get(j.id).reason for j in (high, plain, late, low)]
    assert reasons[0] == f"next; job {name} is running"
    assert reasons[1:] == [f"{n} job{'s' if n > 1 else ''} ahead; job {name} is running" for n in (1, 2, 3)]
    assert rig.client.prioritize(low.id, 9).priority == 9
    assert rig.client.prioritize(low.id, 9).priority == 9
    assert [e.message for e in rig.client.events(low.id) if e.type == "prioritized"] == [
        "priority 9 (was -5)"
    ]
    rig.client.pause(plain.id)
    rig.client.resume(plain.id)  # back at its old place
    rig.scheduler.hold.set()
    ended = [rig.done(j) for j in (running, low, high, plain, late)]
    times = [j.started_at for j in ended]
    assert times == sorted(times)
    with pytest.raises(StateError, match="only a job that is not over has a priority"):
        rig.client.prioritize(low.id, 1)


def test_priorities_out_of_bounds_are_refused(rig):
    with pytest.raises(ConfigError, match="-100 to 100"):
        rig.client.submit(pairs(4), priority=101)
    with pytest.raises(ConfigError, match="priority"):
        exchange(rig, "prioritize", {"job": "ftjob-x", "priority": 101})


def test_why_a_job_waits_before_the_scheduler_is_there_and_where_it_cannot_train(own):
    rig = own(peers=False)
    job = rig.client.submit(pairs(4))
    assert rig.client.get(job.id).reason == "waiting for the scheduler"
    peer = SchedulerPeer(rig.run_dir)
    peer.limits, peer.refusal = None, "AWQ weights cannot be bound"
    peer.start()
    rig._stack.callback(peer.close)
    until(lambda: "AWQ" in rig.client.get(job.id).reason, "the refusal")
    assert rig.client.get(job.id).reason == "this server cannot train: AWQ weights cannot be bound"


def test_a_submit_without_data_or_origin_is_refused(rig):
    with pytest.raises(ConfigError, match="nothing to train on"):
        rig.client.submit()
    with pytest.raises((ConfigError, ProtocolError), match="resume_from alone"):
        exchange(rig, "submit", {})


def test_space_is_counted_by_kind_and_shared_files_once(tmp_path: Path):
    for name in ("data/ids.npy", "checkpoints/step-2/state.safetensors", "adapter/adapter_model.safetensors"):
        path = tmp_path / "ftjob-a" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 8192)
    (tmp_path / "ftjob-b" / "data").mkdir(parents=True)
    (tmp_path / "ftjob-b/data/ids.npy").hardlink_to(tmp_path / "ftjob-a/data/ids.npy")
    (tmp_path / "harli.db").write_bytes(b"x" * 4096)
    found = disk_usage.count(tmp_path)
    assert found == {
        "data_bytes": 8192,
        "checkpoint_bytes": 8192,
        "adapter_bytes": 8192,
        "store_bytes": 4096,
        "total_bytes": 28672,
    }
    assert disk_usage.count(tmp_path / "nowhere")["total_bytes"] == 0


def test_status_shows_the_space(rig):
    rig.done(rig.client.submit(pairs(4)))
    shown = until(
        lambda: s if "total_bytes" in (s := rig.client.status().service["space"]) else None, "a count"
    )
    assert shown["store_bytes"] > 0 and shown["free_bytes"] > 0

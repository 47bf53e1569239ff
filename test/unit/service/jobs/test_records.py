"""No record, event or reply can end the service or keep it from starting: what cannot be kept is
refused, and what cannot be read is left aside and named."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import zmq
import zmq.asyncio

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, HarliError, NotReadyError
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import Event, Hyperparameters
from sglang_harli.service.app import App
from sglang_harli.service.endpoint.subscriptions import Subscriptions
from sglang_harli.service.jobs import record_encoding, transitions
from sglang_harli.service.jobs.record import Asked
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import JobStore, UnwritableError, sqlite_url
from sglang_harli.service.jobs.transitions import JobRecord, Transition
from sglang_harli.service.links.peer_link import PeerLink
from support.service.scheduler_peer import SchedulerPeer
from support.service.service_fixture import exchange, free_port, pairs, submit_args, until
from support.service.service_peers import HttpPeer, ServiceProcess

HUGE = 10**20
LINE = json.dumps({"prompt": "a", "completion": "b"}).encode()


def record(**values: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "id": "ftjob-a",
        "number": 1,
        "created_at": 1.0,
        "status": JobStatus.QUEUED,
        "hyperparameters": Hyperparameters(),
        "model": "m",
        "adapter_name": "m-ft-a",
        "total_steps": 10,
        "data": {"rows": 4, "file": "pairs.jsonl"},
    }
    return JobRecord(**(fields | values))


def with_hyperparameters(**values: Any) -> JobRecord:
    return record(hyperparameters=msgspec.structs.replace(Hyperparameters(), **values))


# ------------------------------------------------------------------ before a job is accepted
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_grad_norm", value) for value in ("inf", "nan", "1e999")),
        *(("checkpoint_every", value) for value in (str(HUGE), HUGE, "1" + "0" * 4000)),
        *(("learning_rate", "nan"), ("seed", str(2**64)), ("max_seq_length", str(HUGE))),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(rig: Any, name: str, value: Any) -> None:
    before = sorted(path.name for path in rig.run_dir.iterdir())
    with pytest.raises(ConfigError, match=name):
        exchange(rig, "submit", submit_args(LINE) | {"hyperparameters": {name: value}}, LINE)
    assert sorted(path.name for path in rig.run_dir.iterdir()) == before
    assert rig.client.status().service["unreadable_jobs"] == {}


@pytest.mark.parametrize(
    "bad",
    [
        with_hyperparameters(max_grad_norm=math.inf),
        with_hyperparameters(max_grad_norm=math.nan),
        with_hyperparameters(checkpoint_every=HUGE),
        record(data={"rows": HUGE}),
        record(data={"rows": math.nan}),
        record(data={"file": "caf\udce9.jsonl"}),
        record(reason="caf\udce9"),
        record(total_steps=2**64),
        record(data={1: "a number as a name"}),
    ],
    ids=range(9),
)
def test_a_record_is_tried_for_all_of_its_readers(bad: JobRecord) -> None:
    with pytest.raises(record_encoding.RecordError):
        record_encoding.check(bad)


def test_a_plain_record_passes() -> None:
    record_encoding.check(record())
    record_encoding.check(
        record(asked=Asked(sha256="", hyperparameters={"target_modules": ("q_proj", "v_proj")}))
    )
    record_encoding.check(record(data={"rows": 4, "notes": ("a", ["b", ("c",)]), "none": None}))
    assert record_encoding.read_record(record_encoding.stored(record())) == record()


# ------------------------------------------------------------------ what a store already holds
BAD_BODIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no-number": lambda body: json.dumps(
        body | {"hyperparameters": body["hyperparameters"] | {"max_grad_norm": None}}
    ),
    "too-large": lambda body: json.dumps(
        body | {"hyperparameters": body["hyperparameters"] | {"checkpoint_every": HUGE}}
    ),
    "torn": lambda body: json.dumps(body)[:-40],
    "empty": lambda body: "",
    "no-text": lambda body: json.dumps(body).encode().replace(b"queued", b"qu\xffued"),
    "unknown-state": lambda body: json.dumps(body | {"status": "resting"}),
}


def test_records_that_cannot_be_read_are_left_aside_and_named(own: Any) -> None:
    rig = own(peers=False)
    kept = rig.client.submit(pairs(4))
    bad = {
        name: rig.client.submit(pairs(4), idempotency_key=f"key of {name}").id
        for name in (*BAD_BODIES, "last")
    }
    rig.service.kill()
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        for name, job in bad.items():
            [(body,)] = store.execute("SELECT body FROM jobs WHERE id = ?", (job,))
            spoiled = BAD_BODIES.get(name, lambda body: "null")(json.loads(body))
            if isinstance(spoiled, bytes):
                store.execute("UPDATE jobs SET body = CAST(? AS TEXT) WHERE id = ?", (spoiled, job))
            else:
                store.execute("UPDATE jobs SET body = ? WHERE id = ?", (spoiled, job))
    for folder in rig.run_dir.glob("ftjob-*"):
        (folder / "job.json").unlink()
    rig.service.start()
    assert [job.id for job in rig.client.list()] == [kept.id]
    assert set(rig.client.status().service["unreadable_jobs"]) == set(bad.values())
    for name, job in bad.items():
        assert (rig.run_dir / job / "data" / "ids.npy").exists()
        with pytest.raises(HarliError, match=f"the record of job {job} in the job store cannot be read"):
            rig.client.get(job)
        with pytest.raises(HarliError, match=job):
            rig.client.submit(pairs(4), idempotency_key=f"key of {name}")
    rig.join_scheduler()
    rig.join_http()
    for job in (kept, rig.client.submit(pairs(4))):  # with a number of its own
        rig.done(job)


def test_an_event_that_cannot_be_read_says_so_in_its_place(own: Any) -> None:
    rig = own(peers=False)
    job = rig.client.submit(pairs(4))
    rig.service.kill()
    folder = rig.folder(job)
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        store.execute("UPDATE events SET body = '{' WHERE id = 2")
    (folder / "events.jsonl").unlink()
    rig.service.start()
    events = list(rig.client.events(job.id))
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert "cannot be read" in events[1].message
    until(lambda: (folder / "events.jsonl").exists(), "the copy")
    until(lambda: len((folder / "events.jsonl").read_text().splitlines()) == len(events), "the whole copy")


def test_deferred_options_that_cannot_be_read_are_left_aside(own: Any) -> None:
    rig = own(peers=False)
    rig.client.set(tpot_slo_ms=70.0)
    rig.service.kill()
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        assert store.execute("UPDATE settings SET value = '{' WHERE key = 'pending_options'").rowcount == 1
    rig.service.start()
    assert rig.client.status().service["store"] == "ok"
    assert "deferred options in the job store cannot be read" in rig.service.log.read_text()


# ------------------------------------------------------------------ the journal
@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(sqlite_url(tmp_path / "harli.db"))
    yield made
    made.close()


def test_a_change_that_the_store_never_takes_is_refused_and_the_others_are_written(
    store: JobStore, tmp_path: Path
) -> None:
    async def work() -> None:
        registry = JobRegistry(store, tmp_path)
        good, bad, clash = (record(id=f"ftjob-{n}", number=n) for n in (1, 2, 3))
        await asyncio.gather(*(registry.add(transitions.created(job, "fine")) for job in (good, bad, clash)))
        unstorable = registry.apply(transitions.warn(registry.get(bad.id), "caf\udce9"))
        taken = registry.apply(Transition(msgspec.structs.replace(registry.get(clash.id), number=1)))
        fine = registry.apply(transitions.warn(registry.get(good.id), "fine"))
        await fine
        for refused in (unstorable, taken):
            with pytest.raises(UnwritableError):
                await refused
        assert set(registry.journal.unwritable) == {bad.id, clash.id}
        await registry.apply(transitions.warn(registry.get(good.id), "and it goes on"))
        assert [e.message for e in store.events(good.id, 3, 9)] == ["fine", "and it goes on"]
        registry.journal.close()

    asyncio.run(work())


def test_a_new_job_that_the_store_refuses_is_none(store: JobStore, tmp_path: Path) -> None:
    async def work() -> None:
        registry = JobRegistry(store, tmp_path)
        await registry.add(transitions.created(record(id="ftjob-1", number=1), "fine"))
        with pytest.raises(UnwritableError):
            await registry.add(
                transitions.created(record(id="ftjob-2", number=1, idempotency_key="k"), "fine")
            )
        await asyncio.sleep(0)
        assert [job.id for job in registry.all()] == ["ftjob-1"]
        assert registry.by_key("k") is None and registry.counts()["queued"] == 1
        registry.journal.close()

    asyncio.run(work())


def test_a_copy_that_can_never_be_written_is_left_out_and_the_journal_goes_on(
    store: JobStore, tmp_path: Path
) -> None:
    async def work() -> None:
        registry = JobRegistry(store, tmp_path)
        bad, good = with_hyperparameters(checkpoint_every=HUGE), record(id="ftjob-b", number=9)
        for job in (bad, good):
            (tmp_path / job.id).mkdir()
            await registry.add(transitions.created(job, "fine"))
        await registry.apply(transitions.warn(registry.get(bad.id), "once more"))
        registry.journal.close()
        assert not registry.journal.ended.done()
        assert not (tmp_path / bad.id / "job.json").exists()
        assert orjson.loads((tmp_path / good.id / "job.json").read_bytes())["id"] == good.id

    asyncio.run(work())


# ------------------------------------------------------------------ followers
def test_followers_wait_for_a_store_that_cannot_be_read(store: JobStore, tmp_path: Path) -> None:
    def event(number: int) -> Event:
        return Event(id=number, job="ftjob-a", created_at=1.0, level="info", type="warning", message="")

    async def work() -> None:
        pushed: list[int] = []
        followers = Subscriptions(store, None, lambda _route, _request, e: pushed.append(e.id) or True)  # type: ignore[arg-type]
        running = asyncio.create_task(followers.run())
        store.write(events=[event(1)])
        followers.follow((b"client",), "1", "ftjob-a", 0)
        while pushed != [1]:
            await asyncio.sleep(0.01)
        store.write(events=[event(2)])
        with sqlite3.connect(tmp_path / "harli.db") as other:
            other.execute("ALTER TABLE events RENAME TO gone")
        followers.committed({"ftjob-a"})
        while followers.trouble is None:
            await asyncio.sleep(0.01)
        assert not running.done() and pushed == [1]
        with pytest.raises(NotReadyError):
            store.events("ftjob-a", 0, 9)
        with sqlite3.connect(tmp_path / "harli.db") as other:
            other.execute("ALTER TABLE gone RENAME TO events")
        while pushed != [1, 2]:
            await asyncio.sleep(0.01)
        assert followers.trouble is None
        running.cancel()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_one_follower_that_cannot_be_served_is_forgotten_and_the_others_are_served(store: JobStore) -> None:
    async def work() -> None:
        pushed: list[str] = []

        def push(_route: Any, request: str, event: Event) -> bool:
            if request == "bad":
                raise ValueError("cannot be encoded")
            pushed.append(request)
            return True

        followers = Subscriptions(store, None, push)  # type: ignore[arg-type]
        running = asyncio.create_task(followers.run())
        store.write(events=[Event(id=1, job="a", created_at=1.0, level="info", type="warning", message="")])
        for request in ("bad", "good"):
            followers.follow((b"client",), request, "a", 0)
        while not pushed:
            await asyncio.sleep(0.01)
        assert (pushed, len(followers), running.done()) == (["good"], 1, False)
        running.cancel()

    asyncio.run(asyncio.wait_for(work(), 30))


# ------------------------------------------------------------------ messages of a peer
def test_a_message_that_goes_wrong_is_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        context, got = zmq.asyncio.Context(), []

        def take(message: Any, _frames: list[bytes]) -> None:
            if message.name == "bad":
                raise KeyError("of no use")
            got.append(message.name)

        endpoint = f"ipc://{tmp_path}/x.sock"
        link = PeerLink(context, endpoint, "http")
        running = asyncio.create_task(link.run(take, lambda: None))
        peer = context.socket(zmq.DEALER)
        peer.connect(endpoint)
        for name in ("bad", "first", "bad", "second"):
            await peer.send(internal.encode(internal.AdapterWanted(name=name)))
        while got != ["first", "second"]:
            await asyncio.sleep(0.01)
        assert link.trouble == "AdapterWanted of http: KeyError: 'of no use'"
        running.cancel()
        await asyncio.wait([running])
        peer.close(0)
        link.close()
        context.term()

    asyncio.run(asyncio.wait_for(work(), 30))
    assert len([r for r in caplog.records if "a message went wrong" in r.message]) == 1


# ------------------------------------------------------------------ replies and runs
def test_a_record_that_cannot_be_shown_or_started_fails_alone(tmp_path: Path, model: Path) -> None:
    """In process: no submit makes such a record."""
    service = ServiceProcess(tmp_path / "runs", model, free_port())
    service.run_dir.mkdir(mode=0o700)
    done, found = threading.Event(), {}

    def client(loop: asyncio.AbstractEventLoop, app: App, stop: asyncio.Event) -> None:
        peer = SchedulerPeer(service.run_dir).start()
        http = HttpPeer(
            service.run_dir
        ).start()  # no job starts before it is known that it hands no tokenizer over
        try:
            with FinetuneClient(service.endpoint) as finetune:
                peer.hold_runs("not yet")
                bad, good = (finetune.submit(pairs(4)).id for _ in range(2))
                found["before"] = [job.id for job in finetune.list()]
                spoil(loop, app, bad)
                try:
                    finetune.list()
                except HarliError as error:
                    found["list"] = error
                peer.hold_runs("")
                until(lambda: app._registry.get(bad).status == JobStatus.FAILED, "the failure")
                until(lambda: finetune.get(good).status == "succeeded", "the end of the other one")
                found["error"] = app._registry.get(bad).error
        finally:
            peer.close()
            http.close()
            done.set()
            loop.call_soon_threadsafe(stop.set)

    def spoil(loop: asyncio.AbstractEventLoop, app: App, job: str) -> None:
        async def change() -> None:
            old = app._registry.get(job)
            values = msgspec.structs.replace(old.hyperparameters, checkpoint_every=HUGE)
            await app._registry.apply(Transition(msgspec.structs.replace(old, hyperparameters=values)))

        asyncio.run_coroutine_threadsafe(change(), loop).result(10)

    async def work() -> None:
        stop = asyncio.Event()
        app = App(service.config)
        thread = threading.Thread(target=client, args=(asyncio.get_running_loop(), app, stop))
        thread.start()
        try:
            await app.run(stop)
        finally:
            await asyncio.to_thread(thread.join)
            app.close()

    asyncio.run(asyncio.wait_for(work(), 90))
    assert done.is_set() and len(found["before"]) == 2
    assert found["list"].code == "internal" and "its answer cannot be sent" in found["list"].message
    assert (
        found["error"].code == "internal" and "cannot be described to the scheduler" in found["error"].message
    )

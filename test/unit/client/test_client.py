"""Both clients against the real finetune service."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang_harli import AsyncFinetuneClient, FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import (
    ConfigError,
    DataError,
    HarliError,
    NotFoundError,
    NotReadyError,
    StateError,
)
from sglang_harli.names import short_id
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import Event, Job
from support.models import write_tokenizer
from support.service.service_fixture import until
from support.service.service_process import ServiceProcess

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, vocab_size=509)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 128}')
    return str(folder)


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[ServiceProcess]:
    process = ServiceProcess(model)
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[FinetuneClient]:
    with FinetuneClient(service.endpoint) as client:
        yield client


def test_importing_the_package_imports_nothing():
    code = "import sys, sglang_harli; print([m for m in ('zmq', 'msgspec', 'orjson') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_job_from_submit_to_cancel(client: FinetuneClient):
    job = client.submit(ROWS, suffix="life", n_epochs=2, batch_size=2)
    assert job.status == JobStatus.QUEUED
    assert (job.suffix, job.total_steps, job.step, job.trained_tokens) == ("life", 6, 0, 0)
    assert job.hyperparameters.n_epochs == 2
    assert client.get(job.id) == job
    assert client.list(limit=1)[0].id == job.id
    assert client.pause(job.id).status == JobStatus.PAUSED
    assert client.resume(job.id).status == JobStatus.QUEUED
    assert client.cancel(job.id).status == JobStatus.CANCELLED
    with pytest.raises(StateError, match="cancelled"):
        client.resume(job.id)
    assert client.wait(job.id, timeout_s=5).status == JobStatus.CANCELLED
    assert [e.type for e in client.events(job.id)][-1] == "cancelled"


def test_data_comes_as_a_path_bytes_or_rows(client: FinetuneClient, tmp_path: Path):
    text = b'{"prompt": "a", "completion": "b"}\n'
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(text)
    from_path, from_bytes = client.submit(path), client.submit(text)
    assert from_path.data["file"] == "pairs.jsonl"
    assert from_path.data["sha256"] == from_bytes.data["sha256"]
    assert client.submit([{"prompt": "a", "completion": "b"}]).data["rows"] == 1


def test_large_data_travels_in_frames(client: FinetuneClient):
    row = b'{"prompt": "a", "completion": "b"}' + b" " * (3 << 20) + b"\n"
    job = client.submit(row * 6)  # 18 MiB: uploaded
    assert job.data["rows"] == 6
    assert job.data["bytes"] > 2 * public.MAX_FRAME_BYTES


def test_data_without_a_row_are_refused(client: FinetuneClient, tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    for data in (b"", [], tmp_path / "empty.jsonl"):
        with pytest.raises(DataError, match="holds no line of data"):
            client.submit(data)
        assert client.check(data)["rows"] == 0


def test_the_blocking_client_works_where_an_event_loop_runs(client: FinetuneClient):
    """As in a notebook, whose cells run in the thread of a loop; iterators outlive the loop."""

    async def cell() -> tuple[str, Iterator[Event], Iterator[Job]]:
        job = client.submit(ROWS).id
        events, looks = client.events(job, follow=True), client.watch(job)
        assert next(events).type == "job_created"
        assert next(looks).status == JobStatus.QUEUED
        return job, events, looks

    job, events, looks = asyncio.run(asyncio.wait_for(cell(), 30))
    client.cancel(job)
    assert [event.type for event in events][-1] == "cancelled"
    assert [look.status for look in looks] == [JobStatus.CANCELLED]


def test_what_has_the_same_name_has_the_same_arguments():
    for name in set(dir(AsyncFinetuneClient)) - {"__aenter__", "__aexit__"}:
        if not name.startswith("_"):
            mine, theirs = (getattr(kind, name) for kind in (FinetuneClient, AsyncFinetuneClient))
            assert inspect.signature(mine).parameters == inspect.signature(theirs).parameters, name
            assert mine.__doc__ == theirs.__doc__ and not inspect.iscoroutinefunction(mine), name
    made = (inspect.signature(kind.__init__).parameters for kind in (FinetuneClient, AsyncFinetuneClient))
    assert len(set(map(str, made))) == 1


def test_bad_lines_are_all_named_and_no_job_is_made(client: FinetuneClient):
    before = len(client.list(limit=1000))
    with pytest.raises(DataError) as caught:
        client.submit(b'{"prompt": "a", "completion": "b"}\n{broken\n\n{"prompt": "a"}\n')
    assert [row["line"] for row in caught.value.details] == [2, 4]
    assert len(client.list(limit=1000)) == before


def test_refusals_have_their_own_types(client: FinetuneClient):
    with pytest.raises(ConfigError, match="n_epoch"):
        client.submit(ROWS, n_epoch=3)
    with pytest.raises(ConfigError, match="max_seq_length=999"):
        client.submit(ROWS, max_seq_length=999)
    with pytest.raises(ConfigError, match="suffix"):
        client.submit(ROWS, suffix="no spaces")
    with pytest.raises(DataError, match="cannot be read"):
        client.submit("/no/such/file.jsonl")
    with pytest.raises(NotFoundError, match="ftjob-none"):
        client.get("ftjob-none")
    with pytest.raises(ConfigError, match="tpot-slo-ms"):
        client.set(tpot_slo_ms=-1)
    with pytest.raises(ConfigError, match="quantum_rows"):
        client.set(quantum_rows=1)


def test_a_repeated_key_makes_one_job(client: FinetuneClient):
    first = client.submit(ROWS, idempotency_key="once")
    assert client.submit(ROWS, idempotency_key="once").id == first.id
    with pytest.raises(ConfigError, match="once"):
        client.submit(ROWS[:2], idempotency_key="once")


def test_find_by_short_id_and_suffix(client: FinetuneClient):
    job = client.submit(ROWS, suffix="found")
    assert client.find(job.id).id == client.find(short_id(job.id)).id == client.find("found").id == job.id
    client.submit(ROWS, suffix="found")
    with pytest.raises(ConfigError, match="names 2 jobs"):
        client.find("found")
    with pytest.raises(NotFoundError):
        client.find("nobody")


def test_set_and_status(client: FinetuneClient):
    answer = client.set(tpot_slo_ms=61, max_itl_ms=None)
    assert answer.outcome == "deferred"  # there is no scheduler here
    assert client.set(tpot_slo_ms=62, if_revision=answer.revision + 5).outcome == "stale"
    found = client.status()
    assert found.options["tpot_slo_ms"] == 50
    assert found.service["scheduler_pid"] is None


def test_following_ends_with_the_job(service: ServiceProcess, client: FinetuneClient):
    job = client.submit(ROWS)
    types: list[str] = []

    def follow() -> None:
        with FinetuneClient(service.endpoint) as other:
            types.extend(event.type for event in other.events(job.id, follow=True))

    thread = threading.Thread(target=follow)
    thread.start()
    client.pause(job.id)
    client.cancel(job.id)
    thread.join(20)
    assert not thread.is_alive()
    assert types == [event.type for event in client.events(job.id)]
    assert types[-1] == "cancelled"
    assert list(client.events(job.id, after=len(types), follow=True)) == []


def test_many_calls_at_once_in_asyncio(service: ServiceProcess):
    async def run() -> None:
        async with AsyncFinetuneClient(service.endpoint) as client:
            jobs = await asyncio.gather(*(client.submit(ROWS, suffix=f"a{i}") for i in range(5)))
            found = await asyncio.gather(*(client.get(job.id) for job in jobs for _ in range(4)))
            assert len({job.id for job in found}) == 5
            followers = [asyncio.create_task(_types(client, job.id)) for job in jobs]
            await asyncio.gather(*(client.cancel(job.id) for job in jobs))
            assert all(types[-1] == "cancelled" for types in await asyncio.gather(*followers))
            assert (await client.wait(jobs[0].id)).status == JobStatus.CANCELLED
            with pytest.raises(NotFoundError):
                await client.pause("ftjob-none")

    asyncio.run(asyncio.wait_for(run(), 60))


async def _types(client: AsyncFinetuneClient, job: str) -> list[str]:
    return [event.type async for event in client.events(job, follow=True)]


def test_calls_wait_for_a_service_that_comes_late_or_restarts(model: str):
    process = ServiceProcess(model)
    try:
        with FinetuneClient(process.endpoint) as client:
            process.start(wait=False)
            job = client.submit(ROWS)
            seen: list[str] = []
            thread = threading.Thread(
                target=lambda: seen.extend(e.type for e in client.events(job.id, follow=True))
            )
            thread.start()
            process.kill()
            process.start(wait=False)
            assert client.cancel(job.id).status == JobStatus.CANCELLED
            thread.join(40)
            assert seen[-1] == "cancelled"
            assert len(seen) == len(set(seen))  # no event twice
    finally:
        process.close()


def test_an_unreachable_service_is_named_with_the_fix(tmp_path: Path):
    with (
        FinetuneClient(f"ipc://{tmp_path}/nobody", connect_timeout_s=0.3) as client,
        pytest.raises(NotReadyError, match="--harli-finetune-endpoint"),
    ):
        client.status()
    with FinetuneClient("nonsense") as client, pytest.raises(ConfigError, match="nonsense"):
        client.status()


class Peer(threading.Thread):
    """Stands in for a service that misbehaves: takes one request per entry and answers it, or dies
    (None)."""

    def __init__(self, endpoint: str, answers: list[dict | None]) -> None:
        super().__init__()
        self.endpoint, self.answers = endpoint, answers
        self.requests: list[public.Request] = []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        for answer in self.answers:
            with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
                socket.bind(self.endpoint)
                assert socket.poll(20_000)
                identity, head, *_ = socket.recv_multipart()
                self.requests.append(public.decode(head, public.Request))
                if answer is not None:
                    socket.send_multipart(
                        [identity, public.encode({"v": 1, "id": self.requests[-1].id, **answer})]
                    )
                    self.done.wait(20)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join(30)

    def __enter__(self) -> Peer:
        return self


def test_a_lost_answer_is_asked_for_again(tmp_path: Path):
    refusal = {"ok": False, "error": {"code": "storage", "message": "disk full"}}
    endpoint = f"ipc://{tmp_path}/peer"
    with Peer(endpoint, [None, refusal]) as peer, FinetuneClient(endpoint) as client:
        with pytest.raises(HarliError, match="disk full") as caught:
            client.submit(ROWS)
        assert caught.value.code == "storage"
        first, second = peer.requests
        assert first.args["idempotency_key"] == second.args["idempotency_key"]


def test_an_unknown_answer_is_refused(tmp_path: Path):
    endpoint = f"ipc://{tmp_path}/peer"
    with (
        Peer(endpoint, [{"ok": True, "result": {"x": 1}}]),
        FinetuneClient(endpoint) as client,
        pytest.raises(HarliError, match="not understood"),
    ):
        client.status()


def test_every_error_type_has_its_code():
    for code, kind in messages.ERRORS.items():
        body = public.ErrorBody(code=code, message="m", param="p", details=[{"line": 1}])
        error = messages.error(public.Reply(id="x", ok=False, error=body))
        assert type(error) is kind
        assert (error.code, error.param, error.details) == (code, "p", [{"line": 1}])


# ------------------------------------------------------------------ a service that is lost and comes back
def test_what_follows_a_job_waits_for_a_lost_service(model: str):
    process = ServiceProcess(model)
    told: dict[str, list[str]] = {"wait": [], "watch": [], "events": []}
    seen: dict[str, list] = {"wait": [], "watch": [], "events": []}
    begun = threading.Barrier(4)

    def follow(how: str, job: str) -> None:
        # Of its own it would give up at once; that it was there before makes it patient.
        with FinetuneClient(process.endpoint, connect_timeout_s=5, on_connection=told[how].append) as client:
            client.get(job)
            begun.wait(20)
            found = {
                "wait": lambda: [client.wait(job, poll_s=0.05)],
                "watch": lambda: client.watch(job, poll_s=0.05),
                "events": lambda: client.events(job, follow=True),
            }[how]()
            seen[how].extend(found)

    try:
        process.start()
        with FinetuneClient(process.endpoint) as client:
            job = client.submit(ROWS)
            threads = [threading.Thread(target=follow, args=(how, job.id)) for how in seen]
            for thread in threads:
                thread.start()
            begun.wait(20)
            until(lambda: client.status().service["followers"] == 1, "the follower")
            process.kill()
            until(lambda: all(told.values()), "everybody noticing the loss")
            process.start()
            client.cancel(job.id)
            for thread in threads:
                thread.join(60)
        assert seen["wait"][-1].status == seen["watch"][-1].status == JobStatus.CANCELLED
        assert seen["events"][-1].type == "cancelled"
        ids = [event.id for event in seen["events"]]
        assert ids == list(range(1, len(ids) + 1))  # none twice, none left out
        assert all(
            lines == ["connection lost, trying again", "connected again"] for lines in told.values()
        ), told
    finally:
        process.close()


def test_patience_ends(model: str):
    process = ServiceProcess(model)
    try:
        process.start()
        told: list[str] = []
        with FinetuneClient(process.endpoint, reconnect_timeout_s=1.5, on_connection=told.append) as client:
            job = client.submit(ROWS)
            follower = client.events(job.id, follow=True)
            next(follower)
            process.kill()
            with pytest.raises(NotReadyError, match="no finetune service answers"):
                client.wait(job.id, poll_s=0.05)
            with pytest.raises(NotReadyError, match="no finetune service answers"):
                list(follower)
        assert told == ["connection lost, trying again"] * 2
    finally:
        process.close()


def test_harli_watch_goes_on_after_a_kill(model: str):
    process = ServiceProcess(model)
    try:
        process.start()
        with FinetuneClient(process.endpoint) as client:
            job = client.submit(ROWS)
            command = [
                sys.executable,
                "-m",
                "sglang_harli.cli",
                "--endpoint",
                process.endpoint,
                "watch",
                job.id,
            ]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as watch:
                assert watch.stdout is not None and watch.stderr is not None
                assert "queued" in watch.stdout.readline()
                process.kill()
                assert watch.stderr.readline() == "connection lost, trying again\n"
                process.start()
                client.cancel(job.id)
                assert watch.wait(30) == 7
                assert watch.stderr.read() == "connected again\n"
                assert "cancelled" in watch.stdout.read()
    finally:
        process.close()


def test_a_busy_service_is_asked_again(tmp_path: Path):
    busy = {"ok": False, "error": {"code": "busy", "message": "try again in a moment"}}
    endpoint = f"ipc://{tmp_path}/peer"
    jobs = {"ok": True, "result": {"jobs": []}}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(endpoint)

        def answer() -> None:
            for reply in (busy, busy, jobs):
                assert socket.poll(20_000)
                identity, head = socket.recv_multipart()
                number = public.decode(head, public.Request).id
                socket.send_multipart([identity, public.encode({"v": 1, "id": number, **reply})])

        thread = threading.Thread(target=answer)
        thread.start()
        with FinetuneClient(endpoint) as client:
            assert client.list() == []
        thread.join(20)

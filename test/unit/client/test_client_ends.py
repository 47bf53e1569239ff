"""Clients that are closed, left or forgotten in the midst of their calls: nothing hangs, nothing is
left open."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_harli import AsyncFinetuneClient, FinetuneClient
from sglang_harli.client.endpoints import check_endpoint
from sglang_harli.errors import ConfigError, StateError
from support.models import write_tokenizer
from support.service.service_fixture import until
from support.service.service_process import ServiceProcess

ROWS = [{"prompt": "a", "completion": "b"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, vocab_size=400)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 128}')
    process = ServiceProcess(str(folder))
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture(scope="module")
def job(service: ServiceProcess) -> str:
    """It waits: there is no scheduler."""
    with FinetuneClient(service.endpoint) as client:
        return client.submit(ROWS).id


def within(seconds: float, do: Callable[[], object]) -> None:
    """``do`` in a thread: what hangs there fails the test and not the suite."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it hangs after {seconds} s"
    if problems:
        raise problems[0]


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------ asyncio
@pytest.mark.parametrize("what", ["events", "watch"])
def test_leaving_an_async_client_after_a_break(service, job, what):
    async def leave() -> None:
        async with AsyncFinetuneClient(service.endpoint) as client:
            found = client.events(job, follow=True) if what == "events" else client.watch(job)
            async for _ in found:
                break

    within(10, lambda: asyncio.run(leave()))


def test_an_async_iterator_that_is_kept_ends_with_its_client(service, job):
    async def keep() -> None:
        client = AsyncFinetuneClient(service.endpoint)
        events = client.events(job, follow=True)
        await anext(events)
        client.close()
        client.close()
        with pytest.raises(StateError, match="this client is closed"):
            async for _ in events:
                pass
        with pytest.raises(StateError, match="this client is closed"):
            await client.get(job)

    within(10, lambda: asyncio.run(keep()))


def test_closing_an_async_client_ends_its_calls(service, job):
    async def close() -> list[object]:
        client = AsyncFinetuneClient(service.endpoint)

        async def follow() -> None:
            async for _ in client.events(job, follow=True):
                pass

        tasks = [asyncio.create_task(follow()), asyncio.create_task(client.wait(job, poll_s=60))]
        with FinetuneClient(service.endpoint) as other:
            while other.status().service["followers"] < 1:
                await asyncio.sleep(0.05)
        client.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found: list[object] = []
    within(10, lambda: found.extend(asyncio.run(close())))
    assert [type(error) for error in found] == [StateError, StateError]


def test_cancelled_calls_leave_nothing_open(service, job):
    async def cancel() -> None:
        async with AsyncFinetuneClient(service.endpoint) as client:
            await client.get(job)
            before = descriptors()
            for _ in range(5):
                tasks = [asyncio.create_task(client.wait(job)) for _ in range(4)]
                await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.5)  # libzmq closes in a thread of its own
            assert descriptors() <= before
            assert (await client.get(job)).id == job

    within(20, lambda: asyncio.run(cancel()))


def test_an_async_iterator_that_is_not_asked_takes_no_time(service, job):
    """What its socket has got meanwhile may not keep the event loop awake."""

    async def idle() -> float:
        async with AsyncFinetuneClient(service.endpoint) as client:
            events = client.events(job, follow=True)
            seen = 0
            while seen < 3:
                seen = (await anext(events)).id
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.2)  # it is subscribed now
            for priority in (1, 2, 3):
                await client.prioritize(job, priority)
            await waiting
            begun = time.process_time()
            await asyncio.sleep(0.5)
            used = time.process_time() - begun
            assert [(await anext(events)).type for _ in range(2)] == ["prioritized"] * 2
            return used

    found: list[float] = []
    within(20, lambda: found.append(asyncio.run(idle())))
    assert found[0] < 0.2


# ------------------------------------------------------------------ blocking
def test_a_kept_iterator_ends_with_its_client(service, job):
    def keep() -> None:
        client = FinetuneClient(service.endpoint)
        events, looks = client.events(job, follow=True), client.watch(job)
        next(events)
        next(looks)
        client.close()
        client.close()
        for left in (events, looks):
            with pytest.raises(StateError, match="this client is closed"):
                list(left)
        with pytest.raises(StateError, match="this client is closed"):
            client.get(job)

    within(10, keep)


def test_closing_from_another_thread_ends_calls(service, job):
    client = FinetuneClient(service.endpoint)
    ended: dict[str, BaseException] = {}

    def run(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except StateError as error:
            ended[name] = error

    calls = {
        "wait": lambda: client.wait(job, poll_s=60),
        "events": lambda: list(client.events(job, follow=True)),
        "unreachable": lambda: FinetuneClient.status(lost),
    }
    lost = FinetuneClient(f"ipc://{service.folder}/nobody")
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in calls.items()]
    for thread in threads:
        thread.start()
    with FinetuneClient(service.endpoint) as other:
        until(lambda: other.status().service["followers"] >= 1, "the follower")
    begun = time.monotonic()
    within(10, client.close)
    within(10, lost.close)
    for thread in threads:
        thread.join(10)
    assert set(ended) == set(calls)
    assert time.monotonic() - begun < 6


def test_a_signal_handler_may_close_the_client(service, job):
    client = FinetuneClient(service.endpoint)
    before = signal.signal(signal.SIGUSR1, lambda *_: client.close())
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(StateError, match="this client is closed"):
            list(client.events(job, follow=True))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_clients_that_are_forgotten_leave_nothing_open(service, job):
    def forget() -> None:
        client = FinetuneClient(service.endpoint)
        kept = [client.events(job, follow=True)]
        next(kept[0])
        kept.append(kept)  # type: ignore[arg-type]  # a cycle: the garbage collector finds it later

    def many() -> None:
        for _ in range(5):
            forget()
        gc.collect()

    many()
    before = descriptors()
    within(20, many)
    until(lambda: descriptors() <= before, "the sockets closing")


# ------------------------------------------------------------------ addresses
@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("tcp://::1:30100", "give tcp://[::1]:30100 (an IPv6 address stands in brackets)"),
        ("tcp://fe80::1:2:30100", "give tcp://[fe80::1:2]:30100"),
        (
            "127.0.0.1:30100",
            "give tcp://127.0.0.1:30100 or another of tcp://127.0.0.1:PORT, tcp://[::1]:PORT",
        ),
        ("http://127.0.0.1:30000", "give the finetune endpoint, not the HTTP address: tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:30100/", "give tcp://127.0.0.1:30100"),
        ("tcp://127.0.0.1", "give tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:0", "a port from 1 to 65535"),
        ("tcp://127.0.0.1:65536", "a port from 1 to 65535"),
        ("tcp://127.0.0.1:http", "give tcp://127.0.0.1:PORT"),
        ("tcp://300.0.0.1:30100", "an IPv4 address"),
        ("tcp://[::zz]:30100", "an IPv6 address within the brackets"),
        ("tcp://*:30100", "* is for servers"),
        ("tcp:// host:30100", "give tcp://127.0.0.1:PORT"),
        ("tcp://127.0.0.1:30100\n", "give tcp://127.0.0.1:PORT"),
        ("ipc://", "a path of 1 to 107 bytes"),
        ("ipc:///" + "x" * 120, "(this one has 121)"),
        ("inproc://x", "give tcp://127.0.0.1:PORT"),
        ("nonsense", "give tcp://127.0.0.1:PORT"),
        ("caf\udce9", "in UTF-8"),
        ("ipc:///tmp/caf\udce9", "in UTF-8"),
    ],
)
def test_an_address_that_can_be_no_service_is_told_at_once(endpoint, says):
    begun = time.monotonic()
    with FinetuneClient(endpoint) as client, pytest.raises(ConfigError) as caught:
        client.status()
    assert says in caught.value.message and caught.value.param == "endpoint"
    assert time.monotonic() - begun < 5
    caught.value.message.encode()


@pytest.mark.parametrize(
    "endpoint",
    [
        *("tcp://127.0.0.1:1", "tcp://localhost:65535", "tcp://[::1]:30100", "tcp://[fe80::1]:30100"),
        *(
            "tcp://a-host.of_some.example:30100",
            "ipc://relative",
            "ipc://@abstract",
            "tcp://127.0.0.1:0;127.0.0.1:5",
        ),
    ],
)
def test_addresses_that_can_be(endpoint):
    check_endpoint(endpoint)


def test_a_socket_of_a_long_path_is_told_with_its_length(tmp_path: Path):
    with (
        FinetuneClient(f"ipc://{tmp_path}/{'x' * 100}") as client,
        pytest.raises(ConfigError, match="107 bytes"),
    ):
        client.status()

"""Supervision of a real server: the service killed or stopped beside traffic, and nothing outlives
the launcher."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError
from sglang_harli.protocol.public import Job
from support.ends import assert_all_end, new_mark
from support.http import PROMPTS, generate, get
from support.models import make_model
from support.server import Server, start_server

ROWS = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(16)]
SERVICE = "sglang_harli.service.app"
BACK_S = 60.0  # asserted generously; the figure that is aimed at is 10 s on 2 cores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launch(model: str, run_dir: Path) -> Iterator[Callable[[], Server]]:
    """Starts a server on one and the same run directory; every process of it carries a mark of its
    own."""
    started: list[Server] = []

    def start() -> Server:
        started.append(start_server(model, "--enable-metrics", run_dir=run_dir, env=new_mark()))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def server(launch: Callable[[], Server]) -> Server:
    running = launch()
    running.wait_ready()
    return running


@pytest.fixture(scope="module")
def job(server: Server) -> Job:
    """One that trains for as long as this file needs it."""
    with FinetuneClient(server.endpoint) as client:
        made = client.submit(ROWS, n_epochs=10_000, batch_size=4, checkpoint_every=5)
        return until(lambda: (j := client.get(made.id)).step > 5 and j, "training")


def until(found: Callable[[], Any], what: str, limit_s: float = 120.0) -> Any:
    end = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < end, f"{what} did not come within {limit_s:g} s"
        time.sleep(0.05)
    return value


def answer(client: FinetuneClient) -> Any:
    try:
        return client.status()
    except HarliError:
        return None


@contextlib.contextmanager
def traffic(server: Server) -> Iterator[list[str]]:
    """Requests one after the other; the list collects those that failed."""
    failed: list[str] = []
    done: list[int] = []
    ending = threading.Event()

    def send() -> None:
        while not ending.is_set():
            try:
                assert len(generate(server.url, PROMPTS[len(done) % len(PROMPTS)], tokens=16)) == 16
                done.append(1)
            except (OSError, AssertionError) as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert done, "no request was answered at all"


# ------------------------------------------------------------------ the service
def metric(server: Server, name: str) -> float | None:
    _, text = get(server.url, "/metrics")
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    return None


def test_metrics_stand_beside_sglangs(server: Server, job: Job) -> None:
    until(lambda: metric(server, 'harli_jobs{status="running"}') == 1.0, "the figure of the job")
    assert metric(server, "harli_service_up") == 1.0
    assert metric(server, "harli_finetune_degraded") == 0.0
    assert metric(server, "harli_service_restarts_total") == 0.0
    assert "sglang:" in get(server.url, "/metrics")[1]


# The stopped one first: a service that has just come back, and has not spoken yet, is waited for
# four times as long.
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_service_comes_back_beside_traffic_and_the_run_goes_on(
    server: Server, job: Job, how: signal.Signals, record_property: Callable[[str, object], None]
) -> None:
    with FinetuneClient(server.endpoint, connect_timeout_s=BACK_S) as client, traffic(server) as failed:
        restarts = metric(server, "harli_service_restarts_total") or 0.0
        lost = server.find(SERVICE)
        lost.send_signal(how)
        since = time.monotonic()
        if how is signal.SIGSTOP:  # found out by its silence
            until(lambda: not lost.is_running(), "the end of the stopped service")
            since = time.monotonic()
        status = until(lambda: answer(client), "an answer", BACK_S)
        took_s = time.monotonic() - since
        record_property(f"service_back_after_{how.name}_s", round(took_s, 2))
        print(f"the service was back {took_s:.1f} s after its death ({how.name})")
        assert status.service["pid"] != lost.pid
        before = client.get(job.id)

        def goes_on() -> Job | None:
            """Steps that come before the new service has met the run again count already: it is
            still queued."""
            now = client.get(job.id)
            return now if now.step > before.step + 3 and now.status == JobStatus.RUNNING else None

        assert until(goes_on, "more steps of the run").attempt == 1
    assert failed == []
    until(lambda: metric(server, "harli_service_restarts_total") == restarts + 1, "the restart's figure")


# ------------------------------------------------------------------ the end
def test_nothing_outlives_a_launcher_that_is_killed(server: Server, job: Job) -> None:
    assert len(server.family()) >= 4  # main, scheduler, detokenizer, service
    assert_all_end(server, signal.SIGKILL)


@pytest.mark.long
def test_nothing_outlives_a_launcher_that_is_killed_while_it_starts(launch: Callable[[], Server]) -> None:
    starting = launch()  # the lock and the sockets of the server before stand in nobody's way
    until(lambda: any("spawn_main" in " ".join(c) for c in commands(starting)), "the first child of SGLang")
    # A child that is being spawned asks for its parent when it has imported SGLang: 12 s, a minute
    # on a busy machine.
    assert_all_end(starting, signal.SIGKILL, 240.0)


def commands(server: Server) -> list[list[str]]:
    found = []
    for process in server.family():
        with contextlib.suppress(psutil.Error):
            found.append(process.cmdline())
    return found

"""The watch over the finetune service, with the real service, real processes and real sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
import zmq.asyncio

from sglang_harli import run_paths
from sglang_harli.client.async_client import AsyncFinetuneClient
from sglang_harli.config import HarliOptions
from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.managers.http import watchdog
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.supervision import supervisor, unavailable_endpoint
from sglang_harli.managers.http.supervision.supervisor import RestartPolicy, Supervisor
from sglang_harli.managers.http.supervision.unavailable_endpoint import UnavailableEndpoint
from sglang_harli.managers.http.watchdog import Patience, SilenceCounter, Watchdog
from sglang_harli.protocol import curve_keys, public
from sglang_harli.service.links import http_link
from support.service.service_fixture import free_port
from support.tokenizer import make_tokenizer_folder

LONG_S = 60.0
HASTE = Patience(tick_s=0.2, silent=45, starting=600)


async def until(found: Callable[[], Any], what: str) -> Any:
    async with asyncio.timeout(LONG_S):
        while not (value := found()):
            await asyncio.sleep(0.02)
    return value


# ------------------------------------------------------------------ silence
def counted(looks: list[tuple[int | None, int, *tuple[int, ...]]], **patience: int) -> list[int]:
    """Indices of the looks after which the service is killed."""
    counter = SilenceCounter(Patience(**{"silent": 3, "starting": 6, **patience}))
    return [index for index, look in enumerate(looks) if counter.look(*look)]


@pytest.mark.parametrize(
    ("looks", "killed"),
    [
        ([(1, n) for n in range(20)], []),  # speaks
        ([(1, 0), (1, 1), *[(1, 1)] * 5], [4]),  # fell silent; then it is another one's turn
        ([(1, 0)] * 7, [6]),  # never spoke
        ([(1, 0)] * 6 + [(2, 0)] * 6, []),  # died by itself in between: the next one starts anew
        ([(1, 0), (1, 1), (None, 1), *[(2, 1)] * 6], []),
        ([(None, 0)] * 50, []),
        ([(1, 0), (1, 1), (1, 1), (1, 1), (1, 2), (1, 2), (1, 2)], []),
        ([(2, 5, 2)] * 4, [3]),  # spoke before the first look at it, and fell silent
        ([(2, 5, 1)] * 7, [6]),  # that was the one before
    ],
)
def test_silence_is_counted_in_looks_at_one_process(
    looks: list[tuple[int | None, int, *tuple[int, ...]]], killed: list[int]
) -> None:
    assert counted(looks) == killed


# ------------------------------------------------------------------ a real service
def options(folder: Path) -> HarliOptions:
    return HarliOptions(run_dir=str(folder / "runs"), finetune_endpoint=f"tcp://127.0.0.1:{free_port()}")


def server_arguments(model: str) -> SimpleNamespace:
    """Those of SGLang's that the service gets."""
    return SimpleNamespace(
        model_path=model,
        tokenizer_path=model,
        served_model_name="base",
        trust_remote_code=False,
        revision=None,
        tokenizer_mode="auto",
        chat_template=None,
        hf_chat_template_name=None,
        default_chat_template_kwargs=None,
        context_length=None,
    )


@asynccontextmanager
async def watched(
    chosen: HarliOptions, keeper: Supervisor, patience: Patience = HASTE
) -> AsyncIterator[tuple[AdapterPublisher, Watchdog]]:
    manager = SimpleNamespace(served_model_name="base", lora_ref_cache={})
    publisher = AdapterPublisher(manager, run_paths.http_endpoint(chosen.absolute_run_dir))
    dog = Watchdog(chosen, lambda: keeper, publisher, None, patience)
    keeper.start()
    publisher.start()
    dog.start()
    try:
        yield publisher, dog
    finally:
        await dog.stop()
        await publisher.stop()
        await asyncio.to_thread(keeper.stop, 2)


@pytest.mark.long
def test_a_service_that_stops_answering_is_killed_and_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(tmp_path)
    model = str(make_tokenizer_folder(tmp_path / "model"))
    arguments = server_arguments(model)
    run_paths.make_ipc_dir(chosen.absolute_run_dir)
    keeper = Supervisor(supervisor.SERVICE_MODULE, supervisor.service_environment(chosen, arguments))

    async def scenario() -> None:
        async with (
            watched(chosen, keeper) as (publisher, _),
            AsyncFinetuneClient(chosen.finetune_endpoint) as client,
        ):
            job = await client.submit([{"prompt": "a", "completion": "b"}] * 4)
            await until(lambda: publisher.state and publisher.state.jobs.get("queued"), "the sign of life")
            hung = keeper.pid
            assert hung is not None
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: keeper.pid not in (None, hung), "another service")
            await until(lambda: publisher.state and publisher.state.pid == keeper.pid, "its word")
            assert (await client.get(job.id)).status == "queued"

    # Signs of life come every 5 s, and this watch waits for 9.
    assert 0.6 * HASTE.tick_s * HASTE.silent > http_link.BEAT_S
    with caplog.at_level(logging.ERROR, logger=watchdog.__name__):
        asyncio.run(scenario())
    assert "has said nothing for 45 looks" in caplog.text
    assert keeper.starts == 2


def test_a_service_is_not_judged_by_a_watch_that_hears_nothing(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    model = str(make_tokenizer_folder(tmp_path / "model"))
    arguments = server_arguments(model)
    run_paths.make_ipc_dir(chosen.absolute_run_dir)
    keeper = Supervisor(supervisor.SERVICE_MODULE, supervisor.service_environment(chosen, arguments))
    hasty = Patience(tick_s=0.05, silent=200, starting=600)

    async def scenario() -> None:
        async with watched(chosen, keeper, hasty) as (publisher, dog):
            await until(lambda: publisher.state, "the sign of life")
            assert publisher.listening
            await publisher.stop()
            assert not publisher.listening
            dog._silence = SilenceCounter(Patience(silent=5, starting=5))
            await asyncio.sleep(40 * hasty.tick_s)
            assert keeper.starts == 1 and keeper.pid is not None

    asyncio.run(scenario())


# ------------------------------------------------------------------ degraded
def test_a_service_that_is_given_up_is_replaced_by_an_endpoint_that_says_so(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    keeper = Supervisor("harli_no_such_module", {}, policy=RestartPolicy(first_s=0.01, limit=2))

    def harli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sglang_harli.cli", "--endpoint", chosen.finetune_endpoint]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=LONG_S)

    async def scenario() -> None:
        async with (
            watched(chosen, keeper) as (publisher, _),
            AsyncFinetuneClient(chosen.finetune_endpoint) as client,
        ):
            status = await client.status()
            assert status.service["state"] == "down"
            assert "ended 2 times in a row" in status.service["reason"]
            assert publisher.down is not None
            for call in (client.list(), client.get("ftjob-1"), client.submit([{"prompt": "a"}])):
                with pytest.raises(
                    NotReadyError, match=r"2 times in a row.*serving goes on.*restart the server"
                ) as e:
                    await call
                assert e.value.code == unavailable_endpoint.CODE
            shown, refused = await asyncio.to_thread(harli, "status"), await asyncio.to_thread(harli, "list")
            assert (shown.returncode, refused.returncode) == (0, 6)
            assert "ended 2 times in a row" in shown.stdout
            assert "restart the server" in refused.stderr

    asyncio.run(scenario())
    probe = zmq.Context().socket(zmq.ROUTER)
    probe.bind(chosen.finetune_endpoint)  # free again
    probe.close()


@pytest.mark.parametrize("guarded", [False, True])
def test_the_stand_in_waits_for_an_endpoint_that_somebody_holds_and_keeps_its_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    monkeypatch.setattr(unavailable_endpoint, "BIND_AGAIN_S", 0.05)
    curve_keys.make_keys(str(tmp_path / "keys"))
    chosen = options(tmp_path).replace(curve_keys=str(tmp_path / "keys" / "server") if guarded else None)
    context = zmq.Context()
    holder = context.socket(zmq.ROUTER)
    holder.bind(chosen.finetune_endpoint)
    unavailable = UnavailableEndpoint(chosen, "it ended", {"queued": 3})

    async def status(keys: Path | None) -> public.StatusAnswer:
        async with AsyncFinetuneClient(
            chosen.finetune_endpoint, curve_keys=keys, connect_timeout_s=20
        ) as client:
            return await client.status()

    async def scenario() -> None:
        await until(lambda: "cannot be bound" in caplog.text, "the line in the log")
        holder.close()
        context.term()
        assert (await status(tmp_path / "keys" / "client" if guarded else None)).jobs == {"queued": 3}
        if guarded:
            with pytest.raises(HarliError, match="keys"):
                await status(None)

    unavailable.start()
    try:
        asyncio.run(scenario())
    finally:
        unavailable.stop()


# ------------------------------------------------------------------ metrics
METRICS = """
import os, tempfile
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
from types import SimpleNamespace
from sglang_harli.managers.http.metrics_collector import MetricsCollector
from sglang_harli.protocol.internal import ServiceState
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
collector = MetricsCollector()
state = ServiceState(pid=1, endpoint_bound=True, scheduler_seen=True, jobs={"queued": 2, "succeeded": 5})
collector.refresh(None, None)
collector.refresh(SimpleNamespace(pid=7, starts=1, gave_up=None), state)
collector.refresh(SimpleNamespace(pid=8, starts=4, gave_up=None), state)
collector.refresh(SimpleNamespace(pid=None, starts=5, gave_up="it died"), state)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_in_prometheus_form() -> None:
    done = subprocess.run([sys.executable, "-c", METRICS], capture_output=True, text=True, timeout=LONG_S)
    lines = done.stdout.splitlines()
    assert {
        "harli_service_up 0.0",
        "harli_service_restarts_total 4.0",
        "harli_finetune_degraded 1.0",
        'harli_jobs{status="queued"} 2.0',
        'harli_jobs{status="succeeded"} 5.0',
        'harli_jobs{status="failed"} 0.0',
    } <= set(lines), done.stderr

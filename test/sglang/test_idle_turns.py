"""Turns of SGLang's loop without a batch, beside a real trainer with a run in progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_harli.managers.scheduler import co_serving
from sglang_harli.managers.scheduler.co_serving import CoServing
from sglang_harli.protocol import internal
from support.plain_arguments import plain_arguments
from support.trainer.co_trainer_host import Host, Peer, batch, spec, temporary_run_dir, until

STEPS = 40


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    for run_dir in temporary_run_dir(tmp_path):
        yield from training(run_dir)


def training(run_dir: str) -> Iterator[Host]:
    """With a run whose micro-batches are all on their way."""
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1, STEPS)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    for step in range(STEPS):
        message, *frames = batch(step)
        peer.send(message, *frames)
    yield host
    host.link.close()
    peer.socket.close()


@pytest.fixture
def serving(host: Host, monkeypatch: pytest.MonkeyPatch) -> CoServing:
    monkeypatch.setattr(co_serving, "IDLE_TURN_S", 0.002)  # one quantum or two
    scheduler = SimpleNamespace(
        device="cpu",
        server_args=plain_arguments(),
        idle_sleeper=None,
        waiting_queue=[],
        chunked_req=None,
        running_batch=SimpleNamespace(reqs=[], batch_is_full=False, is_empty=lambda: True),
        ipc_channels=SimpleNamespace(recv_from_tokenizer=zmq.Context.instance().socket(zmq.PULL)),
        weight_updater=SimpleNamespace(offload_tags=set()),
        _engine_paused=False,
    )
    made = CoServing(scheduler, host.side, host.trainer)
    made.take_messages(0)
    return made


def test_sglangs_part_has_its_turn_at_once_behind_a_batch_and_then_now_and_then(
    serving: CoServing, host: Host
) -> None:
    """Its part publishes the load: a balancer must not see requests that are over."""
    ended: Any = SimpleNamespace(reqs=[], forward_mode=SimpleNamespace(is_decode=lambda: True))
    quanta = host.trainer.quanta
    assert serving.idle() and host.trainer.quanta == quanta
    assert serving.idle() and host.trainer.quanta > quanta  # due for the first time
    quanta = host.trainer.quanta
    assert not serving.idle() and host.trainer.quanta > quanta
    serving.processed(ended, SimpleNamespace())
    quanta = host.trainer.quanta
    assert serving.idle() and host.trainer.quanta == quanta
    assert not serving.idle() and host.trainer.quanta > quanta

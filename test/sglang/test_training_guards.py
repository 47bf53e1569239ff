"""SGLang's release of memory and the end of the server, beside training: the HTTP process's calls,
the real scheduler's trainer."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.communicator import FanOutCommunicator

from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.supervision import supervisor
from sglang_harli.managers.http.training_guards import end_training, refuse_while_training
from sglang_harli.managers.scheduler import control
from sglang_harli.protocol import internal
from support.trainer.co_trainer_host import Host, Peer, spec, temporary_run_dir, until


class Server:
    """A trainer, and SGLang's channel from the HTTP process to it.

    Attributes:
        late: calls are answered by ``answer``, not at once.
    """

    def __init__(self, run_dir: str) -> None:
        self.peer, self.host = Peer(run_dir), Host(run_dir)
        self.late = False
        self._calls: list[Any] = []
        self._channel: FanOutCommunicator[Any] = FanOutCommunicator(self._send, 1)
        self.manager = SimpleNamespace(dumper_control=lambda obj: self._channel(obj))
        until(self.host, self.peer, lambda: self.peer.of(internal.Hello))

    def _send(self, call: Any) -> None:
        self._calls.append(call)
        if not self.late:
            asyncio.get_running_loop().call_soon(self.answer)

    def answer(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            self._channel.handle_recv(control.answer(self.host.trainer, call))

    def start_run(self, attempt: int) -> bool:
        """Whether the scheduler takes a run that the service starts now."""
        self.peer.send(internal.StartRun(spec=spec(attempt)))
        until_s = time.monotonic() + 0.5
        while self.host.trainer.run is None and time.monotonic() < until_s:
            self.host.turn()
            self.host.link.wait(0.005)
            self.peer.pump()
        return self.host.trainer.run is not None

    async def release(self, memory: Callable[[], Coroutine[Any, Any, str]]) -> Any:
        return await refuse_while_training(lambda _manager: memory(), self.manager)

    def close(self) -> None:
        self.host.link.close()
        self.peer.socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for run_dir in temporary_run_dir(tmp_path):
        server = Server(run_dir)
        yield server
        server.close()


@pytest.mark.parametrize("fails", [False, True])
def test_no_run_starts_between_the_question_whether_one_trains_and_the_release(server, fails):
    taken = []

    async def memory() -> str:
        taken.append(server.start_run(1))
        if fails:
            raise RuntimeError("not now")
        server.host.trainer.memory_released(True)
        return "released"

    async def scenario() -> None:
        if fails:
            with pytest.raises(RuntimeError, match="not now"):
                await server.release(memory)
        else:
            assert await server.release(memory) == "released"
            taken.append(server.start_run(2))
            server.host.trainer.memory_released(False)

    asyncio.run(scenario())
    assert not any(taken) and server.host.trainer.hold == ""
    assert server.start_run(3)


def test_a_release_in_training_is_refused_and_holds_nothing(server):
    assert server.start_run(1)

    async def memory() -> str:
        raise AssertionError("released under a run")

    with pytest.raises(ValueError, match="harli pause"):
        asyncio.run(server.release(memory))
    assert server.host.trainer.run is not None and server.host.trainer.hold == ""


def test_the_answer_to_a_call_that_was_given_up_is_not_given_to_the_next_caller(server):
    async def scenario() -> None:
        server.late = True
        await end_training(server.manager, limit_s=0.05)
        given_up = asyncio.create_task(
            AdapterPublisher(server.manager, "inproc://none").ask("harli/hold", {})
        )
        await asyncio.sleep(0)
        given_up.cancel()
        asked = asyncio.create_task(AdapterPublisher(server.manager, "inproc://none").ask("harli/parity", {}))
        await asyncio.sleep(0.05)
        for _ in range(3):
            server.answer()
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(asked, 5) == {"wanted": False}

    asyncio.run(scenario())


def test_the_end_of_the_app_does_not_wait_for_a_scheduler_that_has_ended(server, monkeypatch):
    monkeypatch.setattr(supervisor, "_tree_ended", False)
    assert server.start_run(1)
    server.late = True
    asyncio.run(end_training(server.manager, limit_s=0.05))
    assert len(server._calls) == 1  # a scheduler that may be there is asked
    supervisor.stop_with_tree(os.getpid())
    since = time.monotonic()
    asyncio.run(end_training(server.manager, limit_s=20))
    assert len(server._calls) == 1 and time.monotonic() - since < 10

"""Calls of the HTTP process to the service: many at once, and what becomes of them when it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.errors import ConfigError, HarliError, NotFoundError, NotReadyError
from sglang_harli.managers.http import service_calls
from sglang_harli.managers.http.service_calls import ServiceCalls
from sglang_harli.protocol.calls.files import FileArgs, FileDeleted, StreamAnswer
from sglang_harli.protocol.public import Request
from support.service.verbs_peer import VerbsPeer


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/verbs.sock"


def drive(calls: ServiceCalls, scenario: Coroutine[Any, Any, None]) -> None:
    async def run() -> None:
        calls.start()
        try:
            async with asyncio.timeout(60):
                await scenario
        finally:
            await calls.stop()

    asyncio.run(run())


async def connected(calls: ServiceCalls, wanted: bool = True) -> None:
    while calls.connected is not wanted:
        await asyncio.sleep(0.005)


def deleted(request: Request, _data: Sequence[bytes]) -> Any:
    name = request.args["file"]
    if name == "gone":
        raise NotFoundError("no such file", param="file", details=[{"line": 1}])
    return {"id": name, "deleted": True} if name != "quiet" else None


def delete(calls: ServiceCalls, name: str, **options: Any) -> Coroutine[Any, Any, Any]:
    return calls.call("file_delete", FileArgs(file=name), FileDeleted, **options)


def test_many_calls_at_once_get_their_own_answers(endpoint: str) -> None:
    peer, calls = VerbsPeer(endpoint, deleted).start(), ServiceCalls(endpoint)

    async def scenario() -> None:
        await connected(calls)
        names = [f"file-{number}" for number in range(200)]
        found = await asyncio.gather(*(delete(calls, name) for name in names))
        assert [one.id for one in found] == names

    drive(calls, scenario())
    peer.stop()


def test_a_refusal_keeps_its_type_and_fields(endpoint: str) -> None:
    peer, calls = VerbsPeer(endpoint, deleted).start(), ServiceCalls(endpoint)

    async def scenario() -> None:
        await connected(calls)
        with pytest.raises(NotFoundError, match="no such file") as caught:
            await delete(calls, "gone")
        assert (caught.value.code, caught.value.param) == ("not_found", "file")
        assert caught.value.details == [{"line": 1}]
        with pytest.raises(ConfigError, match="file='' is not accepted"):  # before it is sent
            await delete(calls, "")
        with pytest.raises(HarliError, match="is not understood") as wrong:
            await calls.call("file_delete", FileArgs(file="x"), StreamAnswer)
        assert wrong.value.code == "internal"
        with pytest.raises(NotReadyError, match=r"did not answer 'file_delete' within 0\.01 s") as late:
            await delete(calls, "quiet", timeout_s=0.01)
        assert late.value.code == "timeout"
        assert (await delete(calls, "x")).id == "x"

    drive(calls, scenario())
    peer.stop()


def test_what_is_in_flight_fails_with_the_service_and_a_later_one_works_again(endpoint: str) -> None:
    peer, calls = VerbsPeer(endpoint, deleted), ServiceCalls(endpoint)

    async def scenario() -> None:
        with pytest.raises(NotReadyError) as caught:
            await delete(calls, "a")
        assert caught.value.code == "unavailable"
        for times in (1, 2):
            peer.start()
            await connected(calls)
            waiting = [asyncio.ensure_future(delete(calls, "quiet")) for _ in range(5)]
            while len(peer.asked) < 5 * times:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(peer.stop)
            failed = await asyncio.gather(*waiting, return_exceptions=True)
            assert {getattr(error, "code", None) for error in failed} == {"unavailable"}
            await connected(calls, False)

    drive(calls, scenario())
    assert [request.args["file"] for request in peer.asked] == ["quiet"] * 10  # none came twice


def test_a_service_that_was_given_up_says_why(endpoint: str) -> None:
    calls = ServiceCalls(endpoint, lambda: "it ended 8 times in a row")

    async def scenario() -> None:
        with pytest.raises(NotReadyError, match="it ended 8 times in a row") as caught:
            await delete(calls, "a")
        assert caught.value.code == "finetune_down"

    drive(calls, scenario())


def test_more_than_can_wait_is_refused_as_busy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_calls, "MAX_CALLS", 3)
    peer, calls = VerbsPeer(endpoint, deleted).start(), ServiceCalls(endpoint)

    async def scenario() -> None:
        await connected(calls)
        waiting = [asyncio.ensure_future(delete(calls, "quiet")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError) as caught:
            await delete(calls, "a")
        assert caught.value.code == "busy"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert (await delete(calls, "a")).id == "a"

    drive(calls, scenario())
    peer.stop()

"""A request that one server of a pair refuses ends on the other, which would wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request

from sglang_harli.managers.http import publisher
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.prefill import refused_requests, uploads
from sglang_harli.managers.http.prefill.prefill_servers import PrefillServers
from sglang_harli.managers.http.prefill.refused_requests import (
    RefusalMiddleware,
    RefusedRequests,
    ids_in,
    ids_of,
)
from sglang_harli.managers.http.prefill.uploads import UploadedAdapters

ROOM, OTHER = 7_003_001_002_003, 41


class Manager:
    """What stands for SGLang's TokenizerManager: requests that wait for their peer."""

    def __init__(self, **ids: int | None) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.lora_ref_cache: dict[str, str] = {}
        self.lora_registry = SimpleNamespace(get_all_adapters=dict)
        for rid, room in ids.items():
            self.comes(rid, room)

    def comes(self, rid: str, room: int | None) -> None:
        self.rid_to_state[rid] = SimpleNamespace(obj=SimpleNamespace(bootstrap_room=room))

    def abort_request(self, rid: str) -> None:
        del self.rid_to_state[rid]


@contextlib.asynccontextmanager
async def served(app: FastAPI):
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task


def prefill_app(manager: Manager) -> tuple[FastAPI, UploadedAdapters]:
    app, store = FastAPI(), UploadedAdapters(manager, 1 << 20)
    app.router.routes[:0] = uploads.routes(store, Access(None, None)).routes
    return app, store


async def reached(what: Any) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"model": "x", "bootstrap_room": 12}', [12]),
        (b'{"bootstrap_room": [12, null, 13]}', [12, 13]),
        (b'{"bootstrap_room": 0}', []),
        (b'{"bootstrap_room": true}', []),
        (b'{"bootstrap_room": "12"}', []),
        (b'{"bootstrap_room": 12', []),
        (b'["bootstrap_room"]', []),
        (b'{"text": "no room"}', []),
        (b"", []),
    ],
)
def test_the_ids_of_a_request_are_read_from_its_body(body, ids):
    assert ids_in(body) == ids


def test_what_was_refused_is_kept_for_a_while():
    now = [0.0]
    ids = RefusedRequests(lambda: now[0])
    ids.add([1, 2])
    now[0] = refused_requests.KEPT_S / 2
    ids.add([3])
    assert ids.lately() == [1, 2, 3] and 2 in ids
    now[0] = refused_requests.KEPT_S + 1
    assert ids.lately() == [3] and 2 not in ids
    ids.add(range(1, refused_requests.MAX_KEPT + 10))
    assert len(ids.lately()) == refused_requests.MAX_KEPT


def test_answers_with_an_error_are_noted_and_others_pass():
    async def run() -> None:
        app, seen = FastAPI(), []

        @app.post("/generate")
        async def generate(request: Request) -> Any:
            body = await request.json()
            if body["text"] == "bad":
                raise HTTPException(404, "no such adapter")
            return body

        app.add_middleware(RefusalMiddleware, refused=seen.append)
        async with served(app) as url, httpx.AsyncClient() as client:
            good = {"text": "good", "bootstrap_room": OTHER}
            assert (await client.post(f"{url}/generate", json=good)).json() == good
            answer = await client.post(f"{url}/generate", json={"text": "bad", "bootstrap_room": ROOM})
            assert answer.status_code == 404
            assert (await client.post(f"{url}/generate", json={"text": "bad"})).status_code == 404
            assert (await client.post(f"{url}/generate", content=b"no JSON")).status_code == 500
            assert (await client.get(f"{url}/none")).status_code == 404
        assert seen == [[ROOM]]

    asyncio.run(run())


def test_what_the_decode_server_refuses_ends_on_the_prefill_server_also_if_it_comes_later():
    async def run() -> None:
        manager = Manager(first=ROOM, stays=OTHER, health=0, without=None)
        app, store = prefill_app(manager)
        async with served(app) as url:
            pair = PrefillServers([url], None)
            await pair.servers[0].look(pair.session)
            pair.refused([ROOM, ROOM + 1, ROOM + 2])
            await reached(lambda: "first" not in manager.rid_to_state)
            manager.comes("second", ROOM + 1)
            store.refused.add([ROOM + 2])  # refused on both: nothing to wait for
            await reached(lambda: "second" not in manager.rid_to_state)
            await reached(lambda: not pair._telling)
            assert list(manager.rid_to_state) == ["stays", "health", "without"]
            await pair.stop()
        store.close()

    asyncio.run(run())


def test_what_the_prefill_server_refuses_ends_on_the_decode_server():
    async def run() -> None:
        decode = Manager(waits=ROOM, stays=OTHER)
        app, store = prefill_app(Manager())
        store.refused.add([ROOM])
        async with served(app) as url:
            pair = PrefillServers([url], None, lambda ids: refused_requests.end(decode, ids, 0.0))
            pair.start()
            await reached(lambda: list(decode.rid_to_state) == ["stays"])
            await pair.stop()
        store.close()

    asyncio.run(run())


def test_a_refusal_behind_the_beginning_of_a_stream_is_noted_too():
    async def refuses(manager: Any, obj: Any) -> None:
        raise ValueError("not loaded")

    seen: list[list[int]] = []
    manager = SimpleNamespace(**{refused_requests.ATTRIBUTE: seen.append})
    obj = SimpleNamespace(lora_path="toy-ft-a-00000001", bootstrap_room=[ROOM, OTHER])
    with pytest.raises(ValueError, match="not loaded"):
        asyncio.run(publisher.refuse_another_base(refuses, manager, obj))
    assert seen == [[ROOM, OTHER]] and ids_of(None) == []

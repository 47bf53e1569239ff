"""Adapters of a decode server on its prefill servers: sent, loaded again, unloaded, refused; over
real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.managers.io_struct  # noqa: F401  (a server has it; its import takes seconds)
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from sglang_harli.errors import ConfigError, NotReadyError, UnsupportedError
from sglang_harli.managers.http import model_names, publisher
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.prefill import prefill_server, prefill_servers, uploads, wire
from sglang_harli.managers.http.prefill.prefill_servers import PrefillServers
from sglang_harli.managers.http.prefill.uploads import UploadedAdapters

NAME, OTHER = "toy-ft-a-00000001", "toy-ft-b-00000002"
MOST = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / wire.WEIGHTS).write_bytes(bytes(range(256)) * 40)
    (tmp_path / wire.CONFIG).write_text(json.dumps({"r": 8, "peft_type": "LORA"}))
    return str(tmp_path)


class Manager:
    """What stands for SGLang's TokenizerManager: it loads what lies in a folder."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.lora_ref_cache: dict[str, str] = {}
        self.lora_registry = SimpleNamespace(get_all_adapters=lambda: self.loaded)
        self.refusal = ""
        self.before_load: asyncio.Event | None = None
        self.files: dict[str, bytes] = {}

    async def load_lora_adapter(self, wanted: Any) -> Any:
        if self.before_load is not None:
            await self.before_load.wait()
        if not self.refusal:
            self.files[wanted.lora_name] = Path(wanted.lora_path, wire.WEIGHTS).read_bytes()
            assert json.loads(Path(wanted.lora_path, wire.CONFIG).read_text())["r"] == 8
            self.loaded[wanted.lora_name] = self.lora_ref_cache[wanted.lora_name] = wanted.lora_path
        return SimpleNamespace(success=not self.refusal, error_message=self.refusal)

    async def unload_lora_adapter(self, wanted: Any) -> Any:
        self.loaded.pop(wanted.lora_name)
        return SimpleNamespace(success=True, error_message="")


class Server:
    """A prefill server on a port of its own, which is kept over restarts."""

    def __init__(self, make: Callable[[], FastAPI]) -> None:
        self._make, self.port = make, 0
        self._running: tuple[uvicorn.Server, asyncio.Task[None]] | None = None

    async def start(self) -> None:
        config = uvicorn.Config(self._make(), host="127.0.0.1", port=self.port, log_level="error")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self._running = server, task

    async def stop(self) -> None:
        if self._running is not None:
            server, task = self._running
            server.should_exit = server.force_exit = True
            await task
            self._running = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Harli(Server):
    """One that runs this project."""

    def __init__(self, key: str | None = None, most: int = MOST) -> None:
        self.manager, self.store = Manager(), None
        self._key, self._most = key, most
        super().__init__(self._app)

    def _app(self) -> FastAPI:
        self.manager = Manager()
        self.store: Any = UploadedAdapters(self.manager, self._most)
        app = FastAPI()
        app.router.routes[:0] = uploads.routes(self.store, Access(None, self._key)).routes
        return app

    async def stop(self) -> None:
        await super().stop()
        if self.store is not None:
            self.store.close()


class Plain(Server):
    """One that runs SGLang alone: its routes, with the shapes of their answers."""

    def __init__(self, room: int = 10, mode: str | None = "prefill") -> None:
        self.loaded: list[str] = []
        self.paths: list[str] = []
        self._room, self._mode = room, mode
        super().__init__(self._app)

    def _app(self) -> FastAPI:
        app = FastAPI()
        self.loaded = []

        @app.get("/model_info")
        async def info() -> Any:
            return {} if self._mode is None else {"disaggregation_mode": self._mode}

        @app.get("/v1/models")
        async def models() -> Any:
            return {"data": [{"id": name} for name in ["toy", *self.loaded]]}

        @app.post("/load_lora_adapter")
        async def load(request: Request) -> JSONResponse:
            body = await request.json()
            self.paths.append(body["lora_path"])
            if not Path(body["lora_path"], wire.WEIGHTS).exists():
                return JSONResponse({"success": False, "error_message": "no such file"}, status_code=400)
            self.loaded.append(body["lora_name"])
            del self.loaded[: -self._room]
            return JSONResponse({"success": True})

        @app.post("/unload_lora_adapter")
        async def unload(request: Request) -> JSONResponse:
            self.loaded.remove((await request.json())["lora_name"])
            return JSONResponse({"success": True})

        return app


@contextlib.asynccontextmanager
async def pair(*servers: Server, key: str | None = None, watch: bool = True) -> AsyncIterator[PrefillServers]:
    for server in servers:
        await server.start()
    made = PrefillServers([server.url for server in servers], key)
    if watch:
        made.start()
        await until(lambda: all(server.fresh for server in made.servers))
    try:
        yield made
    finally:
        await made.stop()
        for server in servers:
            await server.stop()


async def until(reached: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not reached():
            await asyncio.sleep(0.02)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_servers, "EVERY_S", 0.05)
    monkeypatch.setattr(prefill_servers, "PAUSE_S", 0.05)


# ------------------------------------------------------------------ on every one
def test_an_adapter_is_on_both_kinds_before_it_answers(folder: str) -> None:
    async def test() -> None:
        harli, plain = Harli(), Plain()
        async with pair(harli, plain) as made:
            assert "does not have it" in made.why_not(NAME)
            await made.ensure(NAME, folder)
            assert made.why_not(NAME) == ""
            assert harli.manager.files[NAME] == Path(folder, wire.WEIGHTS).read_bytes()
            assert plain.loaded == [NAME] and plain.paths == [folder]
            assert made.plain == plain.url
            assert [row["state"] for row in made.status()] == ["there", "there"]
            await made.ensure(NAME, folder)  # again: nothing is sent twice
            assert plain.paths == [folder]

    run(test)


def test_one_that_is_down_puts_the_publication_off(folder: str) -> None:
    async def test() -> None:
        harli, down = Harli(), Plain()
        async with pair(harli, down) as made:
            await down.stop()
            with pytest.raises(NotReadyError, match=down.url):
                await made.ensure(NAME, folder)
            await until(lambda: not made.servers[1].fresh)
            assert down.url in made.why_not(NAME) and "try again" in made.why_not(NAME)
            await down.start()
            await made.ensure(NAME, folder)
            assert made.why_not(NAME) == ""

    run(test)


@pytest.mark.parametrize("kind", [Harli, Plain])
def test_one_that_was_started_again_gets_what_is_served(folder: str, kind: type[Any]) -> None:
    async def test() -> None:
        server = kind()
        async with pair(server) as made:
            await made.ensure(NAME, folder)
            await made.ensure(OTHER, folder)
            await server.stop()
            await until(lambda: made.why_not(NAME) != "")
            await server.start()
            await until(lambda: made.why_not(NAME) == made.why_not(OTHER) == "")
            now = server.loaded if kind is Plain else server.manager.loaded
            assert {NAME, OTHER} <= set(now)

    run(test)


@pytest.mark.parametrize("kind", [Harli, Plain])
def test_what_is_not_served_any_more_goes_there_too(folder: str, kind: type[Any]) -> None:
    async def test() -> None:
        server = kind()
        async with pair(server) as made:
            await made.ensure(NAME, folder)
            made.forget(NAME)
            now = (lambda: server.loaded) if kind is Plain else (lambda: server.manager.loaded)
            await until(lambda: NAME not in now())
            await until(lambda: made.why_not(NAME) != "")
            assert made.status()[0]["missing"] == []
            await made.ensure(NAME, folder)  # a name that comes back stays
            await asyncio.sleep(0.3)
            assert made.why_not(NAME) == ""

    run(test)


def test_a_deletion_in_the_midst_of_a_load_is_final(folder: str) -> None:
    """It would be loaded and unloaded for ever."""

    async def test() -> None:
        server = Harli()
        async with pair(server) as made:
            server.manager.before_load = asyncio.Event()
            publication = asyncio.create_task(made.ensure(NAME, folder))
            await until(lambda: any(Path(server.store._folder.name, NAME).glob(wire.CONFIG)))
            made.forget(NAME)
            server.manager.before_load.set()
            await publication
            await until(lambda: NAME not in server.manager.loaded)
            server.manager.files.clear()
            await asyncio.sleep(0.4)
            assert not server.manager.files and made.status()[0]["missing"] == []

    run(test)


def test_what_is_there_answers_while_another_is_loaded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        server = Harli()
        async with pair(server) as made:
            await made.ensure(NAME, folder)
            await made.ensure(OTHER, folder)
            await server.manager.unload_lora_adapter(SimpleNamespace(lora_name=OTHER))
            server.manager.lora_ref_cache.pop(OTHER)
            server.manager.before_load = asyncio.Event()
            await until(lambda: any(Path(server.store._folder.name).glob(f"{OTHER}/{wire.CONFIG}")))
            monkeypatch.setattr(prefill_server, "FRESH_S", 0.5)
            await asyncio.sleep(1.0)
            assert made.why_not(NAME) == "" and "does not have it" in made.why_not(OTHER)
            server.manager.before_load.set()
            await until(lambda: made.why_not(OTHER) == "")

    run(test)


@pytest.mark.parametrize("mode", ["null", "decode"])
def test_a_server_that_computes_no_prompts_for_others_is_named(folder: str, mode: str) -> None:
    async def test() -> None:
        server = Plain(mode=mode)
        async with pair(server, watch=False) as made:
            with pytest.raises(
                NotReadyError, match=f"no prefill server: its --disaggregation-mode is {mode}"
            ):
                await made.ensure(NAME, folder)
            assert not server.paths

    run(test)


def test_a_server_that_does_not_say_its_mode_is_believed(folder: str) -> None:
    async def test() -> None:
        async with pair(Plain(mode=None)) as made:
            await made.ensure(NAME, folder)

    run(test)


def test_a_plain_one_that_evicted_an_adapter_is_not_sent_it_for_ever(folder: str) -> None:
    """It brings it back by itself; two adapters and room for one would go to and fro."""

    async def test() -> None:
        server = Plain(room=1)
        async with pair(server) as made:
            await made.ensure(NAME, folder)
            await made.ensure(OTHER, folder)
            await asyncio.sleep(0.5)
            assert len(server.paths) == 2
            assert made.why_not(NAME) == made.why_not(OTHER) == ""

    run(test)


def test_a_plain_one_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with pair(Plain()) as made:
            with pytest.raises(UnsupportedError, match="shared storage"):
                await made.ensure(NAME, str(tmp_path / "elsewhere"))

    run(test)


def test_a_refusal_of_sglang_s_ends_the_publication_with_its_reason(folder: str) -> None:
    async def test() -> None:
        server = Harli()
        async with pair(server) as made:
            server.manager.refusal = "rank 8 is above --max-lora-rank 4"
            with pytest.raises(UnsupportedError, match="rank 8 is above"):
                await made.ensure(NAME, folder)
            assert made.why_not(NAME)

    run(test)


# ------------------------------------------------------------------ what is taken
def test_what_is_damaged_on_the_way_or_too_large_is_not_loaded(folder: str) -> None:
    async def test() -> None:
        server = Harli(most=4096)
        async with pair(server) as made:
            with pytest.raises(UnsupportedError, match="too large"):
                await made.ensure(NAME, folder)
            session, at = made.session, server.url + wire.ADAPTER
            good = {wire.CONFIG_HEADER: wire.pack_config({"r": 8}), wire.SHA256_HEADER: "0" * 64}
            for name, headers, said in (
                (NAME, good, "has the SHA-256"),
                (NAME, {**good, wire.SHA256_HEADER: "x"}, "64 hexadecimal digits"),
                (NAME, {**good, wire.CONFIG_HEADER: "e30"}, "no JSON in base64"),
                (NAME, {**good, wire.CONFIG_HEADER: wire.pack_config({"x": "y" * 20000})}, ""),
                ("..%2Fescape", good, ""),
                (".hidden", good, "is not accepted"),
            ):
                async with session.put(at + name, data=b"bytes", headers=headers) as answer:
                    assert answer.status in (400, 404, 431), await answer.text()
                    assert said in await answer.text()
            assert not server.manager.files and not list(Path(server.store._folder.name).iterdir())

    run(test)


@pytest.mark.parametrize(("key", "accepted"), [("secret", True), ("wrong", False), (None, False)])
def test_a_key_closes_the_routes(folder: str, key: str | None, accepted: bool) -> None:
    async def test() -> None:
        server = Harli(key="secret")
        await server.start()
        made = PrefillServers([server.url], key)
        await made.servers[0].look(made.session)
        assert made.servers[0].fresh is accepted
        if accepted:
            await made.ensure(NAME, folder)
        else:
            assert "401" in made.servers[0].trouble
            with pytest.raises(NotReadyError, match="401"):
                await made.ensure(NAME, folder)
        await made.stop()
        await server.stop()

    run(test)


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'{"requests": "all"}'])
def test_refused_requests_that_are_none_are_a_clear_error(body: bytes) -> None:
    async def test() -> None:
        server = Harli()
        async with (
            pair(server, watch=False) as made,
            made.session.post(server.url + wire.REFUSED, data=body) as answer,
        ):
            assert answer.status == 400 and "ids of refused requests" in await answer.text()

    run(test)


def test_a_page_of_another_site_may_send_nothing(folder: str) -> None:
    async def test() -> None:
        server = Harli()
        async with pair(server, watch=False) as made:
            headers = {"Origin": "http://elsewhere.example"}
            async with made.session.put(
                server.url + wire.ADAPTER + NAME, data=b"x", headers=headers
            ) as answer:
                assert answer.status == 403

    run(test)


# ------------------------------------------------------------------ requests
def manager_with(made: Any) -> Any:
    noted = SimpleNamespace(pair=made, others={}, load_meanwhile=lambda name: wanted.append(name))
    wanted: list[str] = []
    return SimpleNamespace(harli_publisher=noted, wanted=wanted, served_model_name="toy", model_path="/toy")


def test_a_request_that_would_wait_for_kv_for_ever_is_refused_at_once(folder: str) -> None:
    async def test() -> None:
        async with pair(Harli()) as made:
            manager = manager_with(made)
            with pytest.raises(HTTPException) as refused:
                publisher.check_pair(manager, [NAME])
            assert refused.value.status_code == 503 and NAME in refused.value.detail
            assert manager.wanted == [NAME]  # and is loaded meanwhile
            await made.ensure(NAME, folder)
            publisher.check_pair(manager, [NAME])
            publisher.check_pair(manager, [])

    run(test)


def test_without_a_prefill_server_no_adapter_answers() -> None:
    with pytest.raises(HTTPException, match="--harli-prefill-url"):
        publisher.check_pair(manager_with(PrefillServers([], None)), [NAME])
    with pytest.raises(ValueError, match="--harli-prefill-url"):  # SGLang's error within a stream
        publisher.check_pair(manager_with(PrefillServers([], None)), [NAME], stream=True)
    publisher.check_pair(manager_with(None), [NAME])  # a server that computes its prompts


def test_a_bare_name_is_refused_where_plain_sglang_would_compute_it_with_the_base() -> None:
    async def test() -> None:
        async with pair(Plain()) as made:
            manager = manager_with(made)
            manager.lora_registry = SimpleNamespace(get_all_adapters=lambda: {NAME: object()})
            manager.lora_ref_cache = {}
            serving = SimpleNamespace(tokenizer_manager=manager)

            def original(_: Any, model: str) -> tuple[str, str | None]:
                return model.partition(":")[0], model.partition(":")[2] or None

            with pytest.raises(HTTPException, match=f"ask for 'toy:{NAME}'") as refused:
                model_names.parse_model_parameter(original, serving, NAME)
            assert refused.value.status_code == 400
            assert model_names.parse_model_parameter(original, serving, f"toy:{NAME}") == ("toy", NAME)
            assert model_names.parse_model_parameter(original, serving, "toy") == ("toy", None)

    run(test)


def test_an_answer_that_is_old_says_nothing(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    async def test() -> None:
        async with pair(Harli()) as made:
            await made.ensure(NAME, folder)
            monkeypatch.setattr(prefill_server, "FRESH_S", -1.0)
            assert "has not answered for some seconds" in made.why_not(NAME)

    run(test)


def test_a_config_travels_as_it_is() -> None:
    config = {"r": 8, "target_modules": ["q_proj"], "base": "ünïcode"}
    assert wire.unpack_config(wire.pack_config(config)) == config
    with pytest.raises(ConfigError):
        wire.unpack_config(None)

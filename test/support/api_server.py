"""The routes of files and fine-tuning on an app of their own, served by uvicorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from sglang_harli.config import HarliOptions
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.install import routes
from sglang_harli.managers.http.service_calls import ServiceCalls


class LoadedModels:
    """What SGLang would have loaded: names.  ``wrong``: why nothing can be unloaded."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.unloaded: list[tuple[str, bool]] = []
        self.wrong = ""

    def is_base(self, name: str) -> bool:
        return name == "org/tiny"

    def is_loaded(self, name: str) -> bool:
        return name in self.names

    async def unload(self, name: str, *, deleted: bool) -> str:
        self.unloaded.append((name, deleted))
        if not self.wrong:
            self.names.discard(name)
        return self.wrong


class ApiServer:
    """Serves from ``start`` to ``stop``; ``endpoint``: the service's inner one; ``down``: why
    there is no service any more.

    Attributes:
        models: what SGLang would have loaded.
        url: ``http://127.0.0.1:PORT``; base_url: for the openai client; calls: to the service.
    """

    def __init__(
        self, endpoint: str, *, access: Access | None = None, down: str | None = None, **options: Any
    ) -> None:
        self.calls = ServiceCalls(endpoint, lambda: down)
        self.models = LoadedModels()

        @contextlib.asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            self.calls.start()
            yield
            await self.calls.stop()

        self.app = FastAPI(lifespan=lifespan)
        self.app.router.routes[:0] = routes(
            self.calls, access or Access(), HarliOptions(**options), self.models
        )
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning", loop="asyncio")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def start(self, *, connected: bool = True) -> ApiServer:
        self._thread.start()
        while not self._server.started or (connected and not self.calls.connected):
            assert self._thread.is_alive()
            threading.Event().wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.url}/v1"
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

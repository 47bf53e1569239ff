"""The routes of files and fine-tuning, served by uvicorn in a process of their own.

``python -m http_api.serve ENDPOINT`` prints its URL and serves until its stdin is closed.  On a
real server the same routes stand in SGLang's HTTP process.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from sglang_harli.config import HarliOptions
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.install import routes
from sglang_harli.managers.http.service_calls import ServiceCalls


class NoModels:
    """``ServedModels`` of a process that serves none: no job here comes to its end."""

    def is_base(self, name: str) -> bool:
        return False

    def is_loaded(self, name: str) -> bool:
        return False

    async def unload(self, name: str, *, deleted: bool) -> str:
        return ""


async def serve(endpoint: str) -> None:
    calls = ServiceCalls(endpoint)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        calls.start()
        yield
        await calls.stop()

    app = FastAPI(lifespan=lifespan)
    app.router.routes[:0] = routes(calls, Access(), HarliOptions(), NoModels())
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    )
    serving = asyncio.create_task(server.serve())
    while not (server.started and calls.connected):
        await asyncio.sleep(0.01)
    print(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

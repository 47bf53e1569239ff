"""HTTP process of a prefill server: adapters that a decode server of its pair sends, as files.

    PUT /harli/prefill/adapters/{name}   a safetensors body; PEFT's config in a header
    DELETE, and GET /harli/prefill       what is there, and the start of this process
    POST /harli/prefill/refused          requests that the decode server refused, which end here

The files lie in a folder of this process, which goes with it: after a restart they are sent again.
SGLang loads them by its own ``load_lora_adapter``, with its checks, and brings them back from there
after an eviction.  Open to whom SGLang's /load_lora_adapter is; without keys to this machine alone.

Leans on SGLang's TokenizerManager (load_lora_adapter, unload_lora_adapter, lora_registry,
lora_ref_cache), io_struct (LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput) and utils.auth.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from sglang_harli.errors import ConfigError, HarliError, NotReadyError, UnsupportedError
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.errors import status_of
from sglang_harli.managers.http.prefill import refused_requests, wire
from sglang_harli.managers.http.prefill.refused_requests import RefusedRequests, ids_of

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # of the disk, which stay free


class UploadedAdapters:
    """The adapters that were sent; ``most_bytes``: of one; ``refused``: this server's refusals."""

    def __init__(self, manager: Any, most_bytes: int) -> None:
        self._manager, self._most_bytes = manager, most_bytes
        self.refused = RefusedRequests()
        self._folder = tempfile.TemporaryDirectory(prefix="harli-prefill-")
        self._digests: dict[str, str] = {}  # of the weights, by name
        self._lock = asyncio.Lock()
        self.start = uuid.uuid4().hex

    def close(self) -> None:
        self._folder.cleanup()

    def names(self) -> list[str]:
        """Adapters that answer: loaded, or brought back by SGLang when asked for."""
        return sorted({*self._manager.lora_registry.get_all_adapters(), *self._manager.lora_ref_cache})

    async def end(self, request: Request) -> None:
        """End the requests that a decode server refused. ConfigError: the body."""
        try:
            asked = await request.json()
        except ValueError:
            asked = None
        if not isinstance(asked, dict) or not (ids := ids_of(asked.get("requests"))):
            raise ConfigError("requests is not accepted: give the ids of refused requests", param="requests")
        await refused_requests.end(self._manager, ids, refused=self.refused)

    async def take(self, name: str, request: Request) -> None:
        """Store what is sent, and load it. May be repeated.

        Raises:
            ConfigError: the name, a header, the length or the checksum.
            NotReadyError: no room on the disk.
            UnsupportedError: SGLang does not load it, with its reason.
        """
        folder = Path(self._folder.name, wire.check_name(name))
        config = wire.unpack_config(request.headers.get(wire.CONFIG_HEADER))
        digest = wire.check_sha256(request.headers.get(wire.SHA256_HEADER))
        self._check_length(request.headers.get("content-length"))
        part = Path(self._folder.name, f"{uuid.uuid4().hex}.part")
        try:
            found = await self._store(part, request)
            if found != digest:
                raise ConfigError(f"{name}: what came has the SHA-256 {found}, not {digest}: send it again")
            async with self._lock:
                if self._digests.get(name) == digest and name in self.names():
                    return
                await self._forget(name)
                await asyncio.to_thread(_place, part, folder, config)
                await self._load(name, folder)
                self._digests[name] = digest
        finally:
            part.unlink(missing_ok=True)
        logger.info("harli: adapter %s came from a decode server and is served", name)

    def _check_length(self, text: str | None) -> None:
        if text is None or not text.isdigit():
            raise ConfigError("send the body with its Content-Length", param="content-length")
        if int(text) > self._most_bytes:
            raise ConfigError(f"an adapter of {text} bytes is too large: at most {self._most_bytes}")
        free = shutil.disk_usage(self._folder.name).free
        if free - int(text) < SPARE_BYTES:
            raise NotReadyError(f"{free} bytes are free on the disk of {self._folder.name}: make room")

    async def _store(self, part: Path, request: Request) -> str:
        """Write the body as it comes; its SHA-256."""
        digest, size = hashlib.sha256(), 0
        with open(part, "wb") as file:
            async for piece in request.stream():
                size += len(piece)
                if size > self._most_bytes:
                    raise ConfigError(f"an adapter is too large: at most {self._most_bytes} bytes")
                digest.update(piece)
                await asyncio.to_thread(file.write, piece)
        return digest.hexdigest()

    async def _load(self, name: str, folder: Path) -> None:
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

        wanted = LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(folder))
        result = await self._manager.load_lora_adapter(wanted)
        if not result.success:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise UnsupportedError(f"{name} is not loaded: {result.error_message}", code="load_failed")

    async def forget(self, name: str) -> None:
        """Unload it, behind the requests that use it; one that is not there is no error."""
        wire.check_name(name)
        async with self._lock:
            await self._forget(name)

    async def _forget(self, name: str) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        if name in self._manager.lora_registry.get_all_adapters():
            result = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
            if not result.success:
                raise NotReadyError(f"{name} is not unloaded: {result.error_message}")
        self._manager.lora_ref_cache.pop(name, None)
        self._digests.pop(name, None)
        await asyncio.to_thread(shutil.rmtree, Path(self._folder.name, name), ignore_errors=True)


def _place(part: Path, folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(mode=0o700)
    part.rename(folder / wire.WEIGHTS)
    (folder / wire.CONFIG).write_text(json.dumps(config))


def routes(store: UploadedAdapters, access: Access) -> APIRouter:
    """To stand before SGLang's."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    router = APIRouter()

    async def answer(request: Request, work: Callable[[], Awaitable[Any]]) -> JSONResponse:
        try:
            access.check(request.scope, admin=True)
            return JSONResponse({"success": True, **(await work() or {})})
        except HarliError as error:
            body = {"success": False, "error_message": error.message}
            return JSONResponse(body, status_code=status_of(error)[0])

    @router.get(wire.LOOK)
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def look(request: Request) -> JSONResponse:
        """What this prefill server has."""

        async def found() -> dict[str, Any]:
            return {"start": store.start, "adapters": store.names(), "refused": store.refused.lately()}

        return await answer(request, found)

    @router.post(wire.REFUSED)
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def end(request: Request) -> JSONResponse:
        """End what a decode server refused: it would wait for it."""
        return await answer(request, lambda: store.end(request))

    @router.put(wire.ADAPTER + "{name}")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def put(name: str, request: Request) -> JSONResponse:
        """Take an adapter, and load it."""
        return await answer(request, lambda: store.take(name, request))

    @router.delete(wire.ADAPTER + "{name}")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def delete(name: str, request: Request) -> JSONResponse:
        """Unload an adapter, and remove its files."""
        return await answer(request, lambda: store.forget(name))

    return router

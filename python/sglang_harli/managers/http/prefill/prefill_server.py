"""One prefill server of the pair, as the decode server's HTTP process sees and uses it.

It runs this project (then it takes files and has a start of its own) or plain SGLang (then it loads
from a folder that it must see under the same path, and reads adapters only as ``base:adapter``).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import aiohttp

from sglang_harli.errors import NotReadyError, UnsupportedError
from sglang_harli.managers.http.prefill import wire
from sglang_harli.managers.http.prefill.refused_requests import ids_of

HARLI, PLAIN, UNKNOWN = "harli", "plain", "unknown"
LOOK_S = 2.0  # a look that takes longer has failed
LOAD_S = 120.0  # SGLang loads behind the batches that it computes
FRESH_S = 3.0  # a look that is older says nothing of now


class PrefillServer:
    """Its state and the calls to it; used in one event loop.

    Args:
        url: as given; key: the bearer token, None: none.

    Attributes:
        kind: harli, plain or unknown (before the first look).
        there: adapters that it has, by the last look; trouble: why that failed, or "".
        refused: ids of the requests that it refused lately, by the last look.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.kind, self.trouble = UNKNOWN, "it was not asked yet"
        self.there: set[str] = set()
        self.refused: list[int] = []
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._start = ""
        self._looked_s = float("-inf")
        self._loads = 0  # that ended well, ever
        # Of a plain one: loaded in its present life; it may have evicted one, and brings it back.
        self._loaded: set[str] = set()

    @property
    def fresh(self) -> bool:
        """Whether the last look says how it is now."""
        return not self.trouble and time.monotonic() - self._looked_s < FRESH_S

    async def look(self, session: aiohttp.ClientSession) -> None:
        """Ask what it has; afterwards ``trouble`` says why that failed, or is empty."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self._look(session)
        except TimeoutError:
            self._lost(f"it does not answer within {LOOK_S:g} s")
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            self._lost(str(error) or type(error).__name__)

    async def _look(self, session: aiohttp.ClientSession) -> None:
        loads = self._loads
        async with session.get(self.url + wire.LOOK, headers=self._headers) as answer:
            if answer.status == 200:
                found = await answer.json()
                self._seen(HARLI, found["start"], set(found["adapters"]), loads)
                self.refused = ids_of(found.get("refused"))
                return
            if answer.status != 404:
                self._lost(f"GET {wire.LOOK} answers {answer.status}: {(await answer.text())[:200]}")
                return
        if self.trouble and (mode := await self._mode(session)) not in ("prefill", None):
            self._lost(f"it is no prefill server: its --disaggregation-mode is {mode}")
            return
        async with session.get(self.url + "/v1/models", headers=self._headers) as answer:
            if answer.status != 200:
                self._lost(f"GET /v1/models answers {answer.status}: {(await answer.text())[:200]}")
                return
            models = {model["id"] for model in (await answer.json())["data"]}
            self._seen(PLAIN, "", models, loads)

    async def _mode(self, session: aiohttp.ClientSession) -> str | None:
        """Its --disaggregation-mode; None: this SGLang does not say it (0.5.16)."""
        async with session.get(self.url + "/model_info", headers=self._headers) as answer:
            return (await answer.json()).get("disaggregation_mode") if answer.status == 200 else None

    def _seen(self, kind: str, start: str, adapters: set[str], loads: int) -> None:
        """``loads``: those before the look began; of a later one it says nothing."""
        if loads != self._loads and start == self._start:
            adapters = adapters | self.there
        if start != self._start or kind != self.kind:
            self._loaded.clear()
        self.kind, self._start, self.trouble = kind, start, ""
        self.there = adapters if kind == HARLI else adapters | self._loaded
        self._looked_s = time.monotonic()

    def _lost(self, why: str) -> None:
        self.trouble, self.there = why, set()
        self._loaded.clear()  # it may come back as another process

    async def load(self, session: aiohttp.ClientSession, name: str, folder: str) -> None:
        """Have it serve an adapter of a PEFT folder.

        Raises:
            NotReadyError: it does not answer, or not now.
            UnsupportedError: it refuses the adapter.
        """
        if self.trouble:
            await self.look(session)
        if self.trouble:
            raise NotReadyError(f"prefill server {self.url}: {self.trouble}")
        if name in self.there:
            return
        if self.kind == HARLI:
            status, text = await self._send(session, name, Path(folder))
        else:
            body = {"lora_name": name, "lora_path": folder}
            status, text = await self._call(session, "POST", "/load_lora_adapter", json=body)
            if status != 200:
                await self.look(session)  # it may be there already, or be another process now
                if name in self.there:
                    return
                text += f" (it must see {folder}, on shared storage)"
        if status == 200:
            self.there.add(name)
            self._loaded.add(name)
            self._loads += 1
            return
        kind = NotReadyError if status >= 500 or status in (401, 403, 429) else UnsupportedError
        raise kind(f"prefill server {self.url} does not load {name} ({status}): {text}", code="load_failed")

    async def _send(self, session: aiohttp.ClientSession, name: str, folder: Path) -> tuple[int, str]:
        weights = folder / wire.WEIGHTS
        config = json.loads(await asyncio.to_thread((folder / wire.CONFIG).read_text))
        headers = {
            wire.CONFIG_HEADER: wire.pack_config(config),
            wire.SHA256_HEADER: await asyncio.to_thread(_sha256, weights),
            "Content-Length": str(weights.stat().st_size),
        }
        with open(weights, "rb") as file:
            return await self._call(session, "PUT", wire.ADAPTER + name, data=file, headers=headers)

    async def unload(self, session: aiohttp.ClientSession, name: str) -> bool:
        """Have it unload an adapter; whether it has none of that name any more."""
        if self.kind == HARLI:
            status, _ = await self._call(session, "DELETE", wire.ADAPTER + name)
        else:
            status, _ = await self._call(session, "POST", "/unload_lora_adapter", json={"lora_name": name})
        if status == 200:
            self._loaded.discard(name)
            self.there.discard(name)
        return status == 200

    async def end(self, session: aiohttp.ClientSession, ids: list[int]) -> None:
        """End its halves of requests that were refused here (plain SGLang cannot)."""
        if self.kind == HARLI:
            await self._call(session, "POST", wire.REFUSED, json={"requests": ids})

    async def _call(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> tuple[int, str]:
        """Status and error; NotReadyError: no answer."""
        try:
            async with asyncio.timeout(LOAD_S):
                sent = session.request(
                    method, self.url + path, headers={**self._headers, **(headers or {})}, **body
                )
                async with sent as answer:
                    text = await answer.text()
                    return answer.status, _message(text)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise NotReadyError(
                f"prefill server {self.url} does not answer {method} {path}: {why}"
            ) from error

    async def generate(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of its /generate; NotReadyError: none."""
        try:
            async with session.post(self.url + "/generate", json=body, headers=self._headers) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:200]
                    raise NotReadyError(
                        f"prefill server {self.url}: /generate answers {answer.status}: {text}"
                    )
                return await answer.json()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise NotReadyError(f"prefill server {self.url} does not answer /generate: {why}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error_message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]

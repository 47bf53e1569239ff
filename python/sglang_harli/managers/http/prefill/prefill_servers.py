"""HTTP process of a decode server: the adapters that it serves are on each prefill server too.

The KV of a prompt is computed by a prefill server, so an adapter answers only where each of them
has it.  One task for each looks at it once a second; another loads again what it lacks (it was
started again) and unloads what is not served any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from sglang_harli.errors import HarliError
from sglang_harli.managers.http.prefill.prefill_server import PLAIN, PrefillServer

logger = logging.getLogger(__name__)

EVERY_S = 1.0
THERE = "there"  # the state of one that answers
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between two tries to load one adapter
NONE_NAMED = (
    "this decode server knows no prefill server, so no prompt can be computed with an adapter: start it with "
    "--harli-prefill-url URL"
)


class PrefillServers:
    """All prefill servers of the pair; lives in the event loop.

    Args:
        key: the bearer token.
        end: ends the requests here that a prefill server refused, by their ids.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        end: Callable[[list[int]], Awaitable[None]] | None = None,
    ) -> None:
        self._end = end
        self._telling: set[asyncio.Task[None]] = set()
        self.servers = [PrefillServer(url, key) for url in urls]
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._served: dict[str, str] = {}  # adapter -> its PEFT folder
        self._gone: set[str] = set()  # to be unloaded where they still are
        self._said: dict[str, str] = {}  # by server, the trouble that was logged
        self._wait: dict[tuple[str, str], tuple[float, float]] = {}  # not before, and the pause

    # ---------------------------------------------------------------- life
    def start(self) -> None:
        if not self.servers:
            logger.warning("harli: %s", NONE_NAMED)
        self._tasks = [
            asyncio.create_task(work(server))
            for server in self.servers
            for work in (self._watch, self._follow)
        ]

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._telling]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return self._session

    async def _watch(self, server: PrefillServer) -> None:
        while True:
            await server.look(self.session)
            self._say(server)
            if not server.trouble and server.refused and self._end is not None:
                await self._end(server.refused)
            await asyncio.sleep(EVERY_S)

    async def _follow(self, server: PrefillServer) -> None:
        """A task of its own: a load may take long, and what is loaded answers meanwhile."""
        while True:
            for name in self._gone & server.there:
                with contextlib.suppress(HarliError):
                    await server.unload(self.session, name)
            for name in [name for name in self._served if name not in server.there]:
                if server.fresh:
                    await self._load_again(server, name)
            await asyncio.sleep(EVERY_S)

    def _say(self, server: PrefillServer) -> None:
        """Log each change of what is wrong."""
        if self._said.get(server.url) == server.trouble:
            return
        self._said[server.url] = server.trouble
        if server.trouble:
            text = "adapters are not served through it"
            logger.warning("harli: prefill server %s: %s: %s", server.url, server.trouble, text)
        else:
            logger.info("harli: prefill server %s (%s) is there", server.url, server.kind)

    async def _load_again(self, server: PrefillServer, name: str) -> None:
        not_before_s, pause_s = self._wait.get((server.url, name), (0.0, PAUSE_S))
        folder = self._served.get(name)
        if folder is None or time.monotonic() < not_before_s:
            return
        try:
            await server.load(self.session, name, folder)
        except (HarliError, OSError, ValueError) as error:
            logger.warning("harli: %s", error)
            pauses = (time.monotonic() + pause_s, min(2 * pause_s, LONGEST_PAUSE_S))
            self._wait[server.url, name] = pauses
            return
        self._wait.pop((server.url, name), None)
        logger.info("harli: adapter %s is on prefill server %s again", name, server.url)

    # ---------------------------------------------------------------- adapters
    async def ensure(self, name: str, folder: str) -> None:
        """Have each prefill server serve an adapter, before it answers here.

        Raises:
            NotReadyError: one does not answer, or not now; UnsupportedError: one refuses it.
            OSError: the folder's files cannot be read.
        """
        self._gone.discard(name)
        for server in self.servers:
            await server.load(self.session, name, folder)
        if name not in self._gone:  # it was deleted meanwhile
            self._served[name] = folder

    def forget(self, name: str) -> None:
        """It is not served here any more: it goes there too."""
        self._served.pop(name, None)
        self._gone.add(name)

    def why_not(self, name: str) -> str:
        """Why a request for an adapter cannot be answered now; "": it can."""
        if not self.servers:
            return NONE_NAMED
        for server in self.servers:
            if not server.fresh:
                why = server.trouble or "it has not answered for some seconds"
                return f"prefill server {server.url} is not to be had ({why}): try again"
            if name not in server.there:
                return f"prefill server {server.url} does not have it: try again once it is loaded there"
        return ""

    def refused(self, ids: list[int]) -> None:
        """Requests were refused here: their halves on the prefill servers end too."""
        for server in self.servers:
            task = asyncio.create_task(self._tell(server, ids))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, server: PrefillServer, ids: list[int]) -> None:
        with contextlib.suppress(HarliError):
            await server.end(self.session, ids)

    @property
    def plain(self) -> str | None:
        """The URL of one that is plain SGLang, if there is any."""
        return next((server.url for server in self.servers if server.kind == PLAIN), None)

    def status(self) -> list[dict[str, Any]]:
        """For ``harli status``."""
        return [
            {
                "url": server.url,
                "kind": server.kind,
                "state": server.trouble or THERE,
                "adapters": len(self._served.keys() & server.there),
                "missing": sorted(self._served.keys() - server.there),
            }
            for server in self.servers
        ]

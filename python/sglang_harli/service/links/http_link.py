"""The service's end of the pair to the HTTP process: the health gate's facts, and publications."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import zmq.asyncio

from sglang_harli.protocol import internal
from sglang_harli.service.links.peer_link import PeerLink

logger = logging.getLogger(__name__)

# An HTTP process that knows no service says hello within a second, one that knew another waits for
# this one's state.  A state sent before a hello was read would pass for the answer to it.
STATE_AFTER_S = 2.0
BEAT_S = 5.0  # the HTTP process restarts a service that is silent for long


class HttpLink:
    """The service's end of the ipc pair to the HTTP process.

    ``state`` builds the ServiceState to send.  ``on_wanted`` gets the name of an adapter to publish
    again, ``on_tokenizer`` the fingerprint of the server's tokenizer at each hello.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        state: Callable[[], internal.ServiceState],
        on_wanted: Callable[[str], None],
        on_tokenizer: Callable[[str], None],
    ) -> None:
        self.peer = PeerLink(context, endpoint, "http")
        self._state = state
        self._on_wanted = on_wanted
        self._on_tokenizer = on_tokenizer
        # By the number of the question: the answer to an older one must not count for this one.
        self._published: dict[int, asyncio.Future[internal.AdapterPublished | None]] = {}
        self._requests = itertools.count(1)
        self.ready = asyncio.Event()  # an HTTP process that can publish is there
        self.pid: int | None = None
        self.prefill_servers: list[dict[str, Any]] | None = None  # of a decode server

    async def run(self) -> None:
        """Receive until cancelled."""
        await self.peer.run(self._receive, self._greet)

    def _greet(self) -> None:
        asyncio.get_running_loop().call_later(
            STATE_AFTER_S, lambda: self.pid or self.peer.send(self._state())
        )

    def tell_state(self) -> None:
        """On every change, and in answer to a hello."""
        if self.pid is not None:
            self.peer.send(self._state())

    def _receive(self, message: Any, _frames: list[bytes]) -> None:
        if isinstance(message, internal.HttpHello):
            if self.pid != message.pid:
                logger.info("hello of the HTTP process, pid %d", message.pid)
                for asked in self._published.values():  # of the one before, which cannot answer any more
                    if not asked.done():
                        asked.set_result(None)
            self.pid = message.pid
            self._on_tokenizer(message.tokenizer)
            self.tell_state()
            self.ready.set()
        elif isinstance(message, internal.AdapterPublished):
            waiting = self._published.get(message.request)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, internal.PrefillState):
            self.prefill_servers = message.servers
        else:
            self._on_wanted(message.name)

    async def beat(self) -> None:
        """Tell every few seconds that this loop turns, until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            state = self._state()
            if self.pid is not None:
                state.adapters, state.others = [], None  # known already; there may be thousands
            self.peer.send(state)

    def refuse(self, name: str, code: str, text: str) -> None:
        """Requests that wait for the adapter ``name``, if there are any, get this error."""
        if self.pid is not None:
            self.peer.send(internal.AdapterRefused(name=name, code=code, text=text))

    async def publish(
        self,
        *,
        job: str,
        name: str,
        config: dict[str, Any],
        slot: internal.SlotRef,
        folder: str,
        timeout_s: float,
    ) -> internal.AdapterPublished | None:
        """Ask for a publication and wait; None: no answer came (it may be repeated)."""
        number = next(self._requests)
        message = internal.PublishAdapter(
            request=number, job=job, name=name, config=config, slot=slot, folder=folder
        )
        answer = self._published[number] = asyncio.get_running_loop().create_future()
        try:
            if not self.peer.send(message):
                self.ready.clear()  # until its next hello
                return None
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            del self._published[number]

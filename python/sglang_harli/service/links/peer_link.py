"""A DEALER socket that this process binds for exactly one peer of the same server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.protocol import internal

logger = logging.getLogger(__name__)

_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class PeerLink:
    """The service's end of an ipc pair: a bound DEALER; ``source`` as in ``internal.decode``."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, source: str) -> None:
        self._socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 500)
        # What is on its way is bounded by the protocol (few micro-batches ahead), not here.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        self._socket.bind(endpoint)
        self._source = source
        self._seq = 0
        self.connected = False
        self.trouble: str | None = None  # the last message that went wrong, and how

    def send(self, message: internal.Message, *frames: Any) -> bool:
        """Hand a message to the socket; False, and not kept, where no peer is there to take it."""
        self._seq += 1
        message.seq = self._seq
        sent: Any = self._socket.send_multipart(
            [internal.encode(message), *frames], flags=zmq.DONTWAIT, copy=not frames
        )
        error = sent.exception() if sent.done() else None
        if error is None:
            return True
        if not isinstance(error, zmq.Again):
            raise error
        return False

    async def run(
        self, on_message: Callable[[Any, list[bytes]], None], on_connect: Callable[[], None]
    ) -> None:
        """Receive until cancelled: ``on_message`` gets each message and its raw frames."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(on_connect))
            group.create_task(self._receive(on_message))

    async def _receive(self, on_message: Callable[[Any, list[bytes]], None]) -> None:
        while True:
            header, *frames = await self._socket.recv_multipart()
            try:
                message = internal.decode(header, self._source)
            except msgspec.MsgspecError as error:
                logger.error("dropped a message from %s: %s", self._source, error)
                continue
            try:
                on_message(message, frames)
            except Exception as error:  # boundary: one message is left out; the peer says again what matters
                self._note(f"{type(message).__name__} of {self._source}: {type(error).__name__}: {error}")

    def _note(self, text: str) -> None:
        if text != self.trouble:  # it may come every few seconds
            logger.exception("a message went wrong: %s", text)
        self.trouble = text

    async def _watch(self, on_connect: Callable[[], None]) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            self.connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self.connected:
                on_connect()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

"""The public ROUTER: limits, frames and routes.  What a request means is the business of ``handle``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
import zmq
import zmq.asyncio

from sglang_harli.errors import HarliError
from sglang_harli.protocol import public
from sglang_harli.service.verbs import Caller

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = public.MAX_FRAME_BYTES + 4096  # libzmq ends the connection of whoever sends more
QUEUE = 64  # messages to or from one client that wait, each way
AT_ONCE = 256  # requests in work; more wait in the clients' queues


class PublicDoor:
    """Args:
        context: the process's.
        endpoint: tcp://127.0.0.1:PORT or ipc://PATH.
        handle: (caller, header, data frames) to the reply.

    Raises:
        HarliError: the endpoint cannot be bound.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        handle: Callable[[Caller, bytes, Sequence[bytes]], Awaitable[public.Reply]],
    ) -> None:
        self._handle = handle
        self._socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.RCVHWM, QUEUE),
            (zmq.SNDHWM, QUEUE),
            (zmq.ROUTER_MANDATORY, 1),  # a client that is gone or does not read is an error, not a silence
            (zmq.HEARTBEAT_IVL, 10_000),
            (zmq.HEARTBEAT_TIMEOUT, 30_000),
            (zmq.HANDSHAKE_IVL, 10_000),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise HarliError(
                f"--harli-finetune-endpoint {endpoint} cannot be bound ({error.strerror}): give a free one",
                code="endpoint",
            ) from error

    async def run(self) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            while True:
                await places.acquire()
                frames = await self._socket.recv_multipart()
                group.create_task(self._one(frames, places))

    async def _one(self, frames: list[bytes], places: asyncio.Semaphore) -> None:
        try:
            identity, *rest = frames
            route = (identity,)
            if len(rest) > 1 and rest[0] == b"":  # a REQ socket's delimiter
                route, rest = (identity, b""), rest[1:]
            if not rest:
                return
            caller = Caller(route, request_id(rest[0]))
            self.send(route, await self._handle(caller, rest[0], rest[1:]))
        finally:
            places.release()

    def send(self, route: tuple[bytes, ...], reply: public.Reply) -> bool | None:
        """True: sent.  False: the client does not read and its queue is full.  None: it is gone."""
        sent: Any = self._socket.send_multipart([*route, public.encode(reply)], flags=zmq.DONTWAIT)
        error = sent.exception() if sent.done() else None
        if error is None:
            return True
        if isinstance(error, zmq.Again):
            return False
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            return None
        raise error

    def push(self, route: tuple[bytes, ...], request: str, event: public.Event) -> bool | None:
        return self.send(route, public.Reply(id=request, ok=True, event=event))

    def close(self) -> None:
        self._socket.close()


def request_id(header: bytes) -> str:
    """The id in a header, however broken the rest is; "" where there is none."""
    if len(header) > public.MAX_HEADER_BYTES:
        return ""
    try:
        found = orjson.loads(header)
    except orjson.JSONDecodeError:
        return ""
    number = found.get("id") if isinstance(found, dict) else None
    return number[:128] if isinstance(number, str) else ""

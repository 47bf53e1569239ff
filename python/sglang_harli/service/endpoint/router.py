"""The public ROUTER: limits, frames and routes; ``handle`` gives requests their meaning."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import zmq
import zmq.asyncio

from sglang_harli.config import is_loopback
from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.protocol import public
from sglang_harli.service.endpoint.client_keys import ClientAuthenticator
from sglang_harli.service.endpoint.verbs import Caller

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = public.MAX_FRAME_BYTES + 4096  # libzmq ends a connection that sends more
WAITING = 8  # messages of one client that libzmq takes in before they are read: of 2 MiB each at most
UNREAD = 64  # messages to one client that wait
UNREAD_S = 10.0  # how long an answer waits for a client that does not read


@dataclass(slots=True)
class _InFlightLimit:
    """How many requests of a kind, and bytes of theirs, are in work at once; more are refused.  One
    for each kind, so that submits that wait for their check do not keep ``status`` waiting."""

    what: str
    most: int
    most_bytes: int
    inside: int = 0
    inside_bytes: int = 0

    def enter(self, size: int) -> None:
        """Raises NotReadyError naming the limit."""
        if self.inside >= self.most or (self.inside and self.inside_bytes + size > self.most_bytes):
            raise NotReadyError(
                f"{self.inside} {self.what} of {self.inside_bytes} bytes are in work, at most {self.most} of "
                f"{self.most_bytes} bytes are taken at once: try again in a moment",
                code=public.BUSY,
            )
        self.inside += 1
        self.inside_bytes += size

    def leave(self, size: int) -> None:
        self.inside -= 1
        self.inside_bytes -= size


class PublicRouter:
    """The public ZMQ ROUTER socket: checks each message, has it handled, and sends the reply.

    ``endpoint``: tcp://127.0.0.1:PORT or ipc://PATH; ``handle``: (caller, header, data frames) to
    the reply; ``keys``: folder of CURVE keys, None: everyone who can reach the endpoint may
    connect; ``name``: in messages.  Raises HarliError: the endpoint cannot be bound, or the keys
    cannot be used.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        handle: Callable[[Caller, bytes, Sequence[bytes]], Awaitable[public.Reply]],
        keys: str | None = None,
        *,
        name: str = "--harli-finetune-endpoint",
    ) -> None:
        self._handle = handle
        submits = _InFlightLimit("submits", 2048, 64 << 20)
        self._limits = {
            "submit": submits,
            "check": submits,
            "upload": _InFlightLimit("chunks", 256, 64 << 20),
            "file_append": _InFlightLimit("pieces of files", 256, 64 << 20),
        }
        self._rest = _InFlightLimit("requests", 1024, 32 << 20)
        self._late = _InFlightLimit("unread answers", 4096, 32 << 20)
        self._keys = ClientAuthenticator(context, keys) if keys else None
        self._socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.RCVHWM, WAITING),
            (zmq.SNDHWM, UNREAD),
            (zmq.ROUTER_MANDATORY, 1),  # a client that is gone or does not read is an error, not a silence
            (zmq.HEARTBEAT_IVL, 10_000),
            (zmq.HEARTBEAT_TIMEOUT, 30_000),
            (zmq.HANDSHAKE_IVL, 10_000),
            (zmq.IPV6, endpoint.startswith("tcp://[")),
        ):
            self._socket.setsockopt(option, value)
        if self._keys is not None:
            self._keys.apply(self._socket)
        elif not is_loopback(endpoint):
            logger.warning("%s is open: everyone who can reach it may submit, see and cancel jobs", endpoint)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise HarliError(
                f"{name} {endpoint} cannot be bound ({error.strerror}): give a free one",
                code="endpoint",
            ) from error

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                frames = await self._socket.recv_multipart()
                self._take(frames, group)
                await asyncio.sleep(0)  # a client that floods this socket does not delay answers

    def _take(self, frames: list[bytes], group: asyncio.TaskGroup) -> None:
        identity, *rest = frames
        route = (identity,)
        if len(rest) > 1 and rest[0] == b"":  # a REQ socket's delimiter
            route, rest = (identity, b""), rest[1:]
        if not rest:
            return
        head, *data = rest
        request, verb = peek(head)
        limit = self._limits.get(verb, self._rest)
        size = len(head) + sum(map(len, data))
        try:
            limit.enter(size)
        except NotReadyError as error:
            body = public.ErrorBody(code=error.code, message=error.message)
            self.send(route, public.Reply(id=request, ok=False, error=body))
            return
        group.create_task(self._one(Caller(route, request), head, data, limit, size))

    async def _one(
        self, caller: Caller, head: bytes, data: list[bytes], limit: _InFlightLimit, size: int
    ) -> None:
        try:
            answer = _encoded(await self._handle(caller, head, data))
        finally:
            limit.leave(size)
        data.clear()
        if self._send(caller.route, answer) is False:
            await self._send_late(caller.route, answer)

    async def _send_late(self, route: tuple[bytes, ...], answer: bytes) -> None:
        """To a client that reads slowly; one that does not read at all loses its answers."""
        end = time.monotonic() + UNREAD_S
        try:
            self._late.enter(len(answer))
        except NotReadyError as error:
            logger.warning("an answer is dropped, its client does not read: %s", error)
            return
        try:
            while time.monotonic() < end:
                await asyncio.sleep(0.05)
                if self._send(route, answer) is not False:
                    return
        finally:
            self._late.leave(len(answer))

    def send(self, route: tuple[bytes, ...], reply: public.Reply) -> bool | None:
        """True: sent.  False: the client does not read and its queue is full.  None: it is gone."""
        return self._send(route, _encoded(reply))

    def _send(self, route: tuple[bytes, ...], message: bytes) -> bool | None:
        sent: Any = self._socket.send_multipart([*route, message], flags=zmq.DONTWAIT)
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
        if self._keys is not None:
            self._keys.close()


def _encoded(reply: public.Reply) -> bytes:
    """The reply, or that there is one which cannot be sent."""
    try:
        return public.encode(reply)
    except public.CODING_ERRORS as error:
        logger.exception("a reply cannot be encoded")
        text = f"the service failed at this request: its answer cannot be sent ({type(error).__name__})"
        body = public.ErrorBody(code="internal", message=text)
        return public.encode(public.Reply(id=reply.id, ok=False, error=body))


def peek(header: bytes) -> tuple[str, str]:
    """Id and verb in a header, however broken the rest is; "" for what is missing."""
    if len(header) > public.MAX_HEADER_BYTES:
        return "", ""
    try:
        found = orjson.loads(header)
    except orjson.JSONDecodeError:
        return "", ""
    values = [found.get(name) if isinstance(found, dict) else None for name in ("id", "verb")]
    number, verb = (value[:128] if isinstance(value, str) else "" for value in values)
    return number, verb

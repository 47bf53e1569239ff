"""The client's socket: carries out what ``exchange`` and ``calls`` ask for, blocking or in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.errors import ConfigError
from sglang_harli.protocol.curve_keys import ClientKeys

LINGER_MS = 200
_REFUSED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
)


class Wire:
    """A DEALER socket and its monitor.  ``IMMEDIATE``: nothing is queued for a peer that is not there."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None, poller: Any
    ) -> None:
        self._context, self._endpoint, self._keys, self.poller = context, endpoint, keys, poller
        self._socket: Any = None
        self._monitor: Any = None
        self._lost = False

    def open(self, with_keys: bool) -> None:
        self.close()
        self._lost = False
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1),
            (zmq.LINGER, LINGER_MS),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 20_000),
            (zmq.IPV6, self._endpoint.startswith("tcp://[")),
        ):
            self._socket.setsockopt(option, value)
        if self._keys is not None and with_keys:
            self._keys.apply(self._socket)
        wanted = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | sum(_REFUSED)
        self._monitor = self._socket.get_monitor_socket(wanted)
        self.poller.register(self._socket, zmq.POLLIN)
        self.poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"endpoint {self._endpoint!r} is not accepted ({error.strerror}): give tcp://127.0.0.1:PORT or "
                "ipc://PATH",
                param="endpoint",
            ) from error

    def send(self, frames: Sequence[Any]) -> None:
        self._socket.getsockopt(zmq.EVENTS)  # libzmq takes note of what its other thread did, as in read()
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._lost = True  # the peer has just gone

    def read(self) -> tuple[str, Any]:
        """What there is, without waiting; an answer comes before the news that the peer left after it."""
        event = None
        if not self._lost:
            with contextlib.suppress(zmq.Again):
                news = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                event = news["event"]
                if event in _REFUSED:
                    return "refused", _why(event, news["value"])
        self._lost = self._lost or event == zmq.Event.DISCONNECTED
        self._socket.getsockopt(zmq.EVENTS)
        try:
            return "message", self._socket.recv_multipart(zmq.NOBLOCK)[0]
        except zmq.Again:
            pass
        if self._lost:
            self._lost = False
            return "lost", None
        return ("nothing" if event is None else "connected"), None

    def close(self) -> None:
        if self._socket is not None:
            self.poller.unregister(self._socket)
            self.poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
            self._socket = self._monitor = None


class SyncWire(Wire):
    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None) -> None:
        super().__init__(context, endpoint, keys, zmq.Poller())

    def do(self, operation: str, argument: Any) -> Any:
        if operation == "open":
            return self.open(argument)
        if operation == "send":
            return self.send(argument)
        if operation == "wait":
            if not self._lost:
                self.poller.poll(argument * 1000)
            return self.read()
        if operation == "call":
            return argument()
        return time.sleep(argument)


class AsyncWire(Wire):
    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None) -> None:
        super().__init__(context, endpoint, keys, zmq.asyncio.Poller())

    async def do(self, operation: str, argument: Any) -> Any:
        if operation == "open":
            return self.open(argument)
        if operation == "send":
            return self.send(argument)
        if operation == "wait":
            if not self._lost:
                await self.poller.poll(argument * 1000)
            return self.read()
        if operation == "call":
            return await asyncio.to_thread(argument)
        return await asyncio.sleep(argument)


def _why(event: int, value: int) -> str:
    """``key``: it is not known there; ``mechanism``: one side uses CURVE, the other does not; ``unclear``."""
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        return "key"
    mismatch = (
        event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    )
    return "mechanism" if mismatch else "unclear"

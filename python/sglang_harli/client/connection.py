"""The socket of one call, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.client.endpoints import FORMS
from sglang_harli.errors import ConfigError, StateError
from sglang_harli.protocol.curve_keys import ClientKeys

LINGER_MS = 200
_REFUSED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
)


class Connection:
    """A DEALER socket and its monitor; used and ended in one event loop.

    ``IMMEDIATE`` is set: nothing is queued for a peer that is not there.

    Args:
        context: of the socket.
        endpoint: of the service.
        keys: CURVE keys; None: there are none.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None) -> None:
        self._context, self._endpoint, self._keys = context, endpoint, keys
        self._socket: Any = None
        self._monitor: Any = None
        self._lost = False
        self._ended = asyncio.Event()
        self._news = asyncio.Event()
        self._watched: tuple[asyncio.AbstractEventLoop, list[int]] | None = None

    def open(self, *, with_keys: bool = True) -> None:
        """A fresh socket, which begins to connect.

        Raises:
            ConfigError: the endpoint is no address.
            StateError: the client was closed.
        """
        self._check()
        self._close()
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
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"endpoint {self._endpoint!r} is not accepted ({error.strerror}): give {FORMS}",
                param="endpoint",
            ) from error

    def send(self, frames: Sequence[Any]) -> None:
        """Hand a message over; where the peer has just gone, ``wait`` says so."""
        self._check()
        self._socket.getsockopt(zmq.EVENTS)  # libzmq takes note of what its other thread did, as in _read()
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._lost = True

    async def wait(self, seconds: float) -> tuple[str, Any]:
        """What comes first within so many seconds: ``connected``, ``lost``, ``refused`` with why, ``message`` with its
        first frame, or ``nothing``."""
        self._check()
        if not self._lost and not self._readable():
            await self._wait_for_news(seconds)
        return self._read()

    async def sleep(self, seconds: float) -> None:
        """At most so long: less where the client is closed."""
        await _wait(self._ended, seconds)

    def end(self) -> None:
        """No more is done; a call under way notices at once."""
        self._unwatch()
        self._close()
        self._ended.set()
        self._news.set()

    # ------------------------------------------------------------------ helpers
    def _check(self) -> None:
        if self._ended.is_set():
            raise closed()

    def _read(self) -> tuple[str, Any]:
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

    async def _wait_for_news(self, seconds: float) -> None:
        """Until a socket has something.  Their descriptors signal changes only: nobody may wait where something is
        there already, and they are watched no longer than somebody waits."""
        self._news.clear()
        loop = asyncio.get_running_loop()
        self._watched = loop, [self._socket.FD, self._monitor.FD]
        for descriptor in self._watched[1]:
            loop.add_reader(descriptor, self._news.set)
        end = loop.time() + seconds
        try:
            while not self._readable() and (left := end - loop.time()) > 0:
                self._news.clear()
                await _wait(self._news, left)
                self._check()
        finally:
            self._unwatch()

    def _readable(self) -> bool:
        return bool((self._socket.EVENTS | self._monitor.EVENTS) & zmq.POLLIN)

    def _unwatch(self) -> None:
        if self._watched is not None:
            loop, descriptors = self._watched
            self._watched = None
            if not loop.is_closed():
                for descriptor in descriptors:
                    loop.remove_reader(descriptor)

    def _close(self) -> None:
        opened, self._socket = self._socket, None
        monitor, self._monitor = self._monitor, None
        if opened is not None:
            opened.disable_monitor()
            monitor.close(0)
            opened.close()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def closed() -> StateError:
    return StateError("this client is closed: make a new one", code="client_closed")


def _why(event: int, value: int) -> str:
    """``key``: it is not known there; ``mechanism``: one side uses CURVE, the other does not; ``unclear``."""
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        return "key"
    mismatch = (
        event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    )
    return "mechanism" if mismatch else "unclear"

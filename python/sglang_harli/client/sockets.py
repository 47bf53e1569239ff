"""The socket of one call, and how it waits: blocking a thread, or in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.client.endpoints import FORMS
from sglang_harli.errors import ConfigError, StateError
from sglang_harli.protocol.curve_keys import ClientKeys

T = TypeVar("T")

LINGER_MS = 200
_REFUSED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
)


class Wire:
    """A DEALER socket and its monitor.  ``IMMEDIATE``: nothing is queued for an absent peer.

    ``open``, ``send`` and ``wait`` raise StateError once the wire was ended.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None) -> None:
        self._context, self._endpoint, self._keys = context, endpoint, keys
        self._socket: Any = None
        self._monitor: Any = None
        self._lost = False
        self._ended = threading.Event()
        # Held while the sockets are used.  Reentrant: the garbage collector may end a wire in the
        # midst of anything.
        self._using = threading.RLock()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._using:
            if self._ended.is_set():
                raise closed()
            try:
                yield
            except (zmq.ZMQError, AttributeError) as error:
                if self._ended.is_set():  # by a signal handler of this thread: the sockets are gone
                    raise closed() from error
                raise

    def open(self, *, with_keys: bool = True) -> None:
        """A fresh socket, in place of the last one."""
        with self._in_use():
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
                if self._ended.is_set():
                    raise
                raise ConfigError(
                    f"endpoint {self._endpoint!r} is not accepted ({error.strerror}): give {FORMS}",
                    param="endpoint",
                ) from error

    def send(self, frames: Sequence[Any]) -> None:
        with self._in_use():
            self._socket.getsockopt(zmq.EVENTS)  # libzmq takes note of what its other thread did, as in _read
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._lost = True  # the peer has just gone

    async def wait(self, seconds: float) -> tuple[str, Any]:
        """The next news: ``connected``, ``lost``, ``refused`` with why, ``message`` with its first
        frame, or ``nothing`` in that time."""
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        """Returns early where the wire is ended meanwhile."""
        raise NotImplementedError

    async def run(self, function: Callable[[], T]) -> T:
        """The result of a function that takes its time."""
        raise NotImplementedError

    def end(self) -> None:
        """No more is done; a call under way notices within a second."""
        self._ended.set()
        with self._using:
            self._close()

    def _read(self) -> tuple[str, Any]:
        """What there is, without waiting; an answer comes before the news that the peer left."""
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

    def _close(self) -> None:
        opened, self._socket = self._socket, None
        monitor, self._monitor = self._monitor, None
        if opened is not None:
            opened.disable_monitor()
            if monitor is not None:  # else opening was interrupted
                monitor.close(0)
            opened.close()


class BlockingWire(Wire):
    """Used by one thread, ended by any.  Its coroutines never suspend: they block the thread."""

    async def wait(self, seconds: float) -> tuple[str, Any]:
        with self._in_use():
            if not self._lost:
                sockets = [(self._socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)]
                zmq.zmq_poll(sockets, int(seconds * 1000))
            return self._read()

    async def sleep(self, seconds: float) -> None:
        self._ended.wait(seconds)

    async def run(self, function: Callable[[], T]) -> T:
        return function()


class AsyncWire(Wire):
    """Used and ended in one event loop; a call under way notices the end at once."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, keys: ClientKeys | None) -> None:
        super().__init__(context, endpoint, keys)
        self._end_of_sleep = asyncio.Event()
        self._news = asyncio.Event()
        self._watched: tuple[asyncio.AbstractEventLoop, list[int]] | None = None

    async def wait(self, seconds: float) -> tuple[str, Any]:
        with self._in_use():
            readable = self._lost or self._readable()
        if not readable:
            await self._wait_for_news(seconds)
        with self._in_use():
            return self._read()

    async def sleep(self, seconds: float) -> None:
        await _wait(self._end_of_sleep, seconds)

    async def run(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)

    async def _wait_for_news(self, seconds: float) -> None:
        """Until a socket has something.  Their descriptors tell of changes only: they are watched
        only while a call waits, and none may wait where something is there already."""
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
                if self._ended.is_set():
                    raise closed()
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

    def end(self) -> None:
        self._unwatch()
        super().end()
        self._end_of_sleep.set()
        self._news.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def closed() -> StateError:
    return StateError("this client is closed: make a new one", code="client_closed")


def _why(event: int, value: int) -> str:
    """``key``: not known there; ``mechanism``: only one side uses CURVE; ``unclear``."""
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        return "key"
    mismatch = (
        event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    )
    return "mechanism" if mismatch else "unclear"

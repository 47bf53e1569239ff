"""HTTP process: the calls of its routes to the finetune service, over one socket in the event loop.

Many calls are in flight at once; a reply is matched by its id.  A call while the service is away,
and one that is in flight when it goes, fails at once with the code ``unavailable``.  After a
restart of the service the socket connects again by itself.  Serving's requests never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.errors import ConfigError, HarliError, NotReadyError, ProtocolError
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import BUSY, Reply

logger = logging.getLogger(__name__)

UNAVAILABLE = "unavailable"  # the code of a call that found no service, or lost it
DOWN = "finetune_down"  # the service was given up
CALL_S = 60.0
MAX_CALLS, MAX_CALL_BYTES = 1024, 64 << 20  # in flight; more are refused as busy
MAX_DATA_CALLS = 32  # in flight with a data frame, of at most 1 MiB each; more wait
OPEN_AGAIN_S = 1.0


class ServiceCalls:
    """The HTTP process's socket to the service's inner endpoint.

    Args:
        endpoint: run_paths.verbs_endpoint(run_dir).
        down: why there is no service any more; None while there is one, or will be again.
    """

    def __init__(self, endpoint: str, down: Callable[[], str | None] = lambda: None) -> None:
        self._endpoint = endpoint
        self._down = down
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None  # while it is connected
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._waiting_bytes = 0
        self._data_calls = asyncio.Semaphore(MAX_DATA_CALLS)
        self._task: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- life
    def start(self) -> None:
        """Begin to connect; inside the server's running event loop."""
        self._task = asyncio.create_task(self._run(), name="harli-service-calls")
        self._task.add_done_callback(_log_failure)

    async def stop(self) -> None:
        """End; calls in flight fail as where the service goes away."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    @property
    def connected(self) -> bool:
        return self._socket is not None

    # ---------------------------------------------------------------- calls
    async def call(
        self, verb: str, args: Any, kind: Any, data: Sequence[bytes] = (), timeout_s: float = CALL_S
    ) -> Any:
        """The service's answer to one request, as ``kind``.

        Args:
            args: a Struct of ``protocol``, or its fields.
            data: frames that follow the header.

        Raises:
            NotReadyError: the service is away or goes away (``unavailable``), was given up
                (``finetune_down``), is busy, or does not answer within ``timeout_s``.
            HarliError: what it refuses with, as its own type; ``internal``: its answer is not of
                the protocol.
        """
        head = messages.header(verb, args)
        frames = [public.encode(head), *data]
        if len(frames[0]) > public.MAX_HEADER_BYTES:
            text = f"the request has {len(frames[0])} bytes, at most {public.MAX_HEADER_BYTES} are accepted"
            raise ConfigError(text, code="too_large")
        if not data:
            return _as(kind, await self._ask(head.id, verb, frames, timeout_s))
        async with self._data_calls:
            return _as(kind, await self._ask(head.id, verb, frames, timeout_s))

    async def _ask(self, request: str, verb: str, frames: list[bytes], timeout_s: float) -> Reply:
        socket = self._socket
        if socket is None:
            raise self._away()
        size = sum(map(len, frames))
        if len(self._waiting) >= MAX_CALLS or self._waiting_bytes + size > MAX_CALL_BYTES:
            text = f"{len(self._waiting)} requests wait for the finetune service: try again in a moment"
            raise NotReadyError(text, code=BUSY)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request] = answer
        self._waiting_bytes += size
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    # Not queued where it cannot be sent: a close would cancel what waits, which is
                    # this task.
                    await socket.send_multipart(frames, zmq.NOBLOCK)
                except zmq.ZMQError as error:  # it has just gone
                    raise self._away() from error
                return await answer
        except TimeoutError as error:
            text = f"the finetune service did not answer {verb!r} within {timeout_s:g} s: try again later"
            raise NotReadyError(text, code="timeout") from error
        finally:
            del self._waiting[request]
            self._waiting_bytes -= size
            if answer.done() and not answer.cancelled():
                answer.exception()  # it is raised by this call, or by what ended it before

    def _away(self) -> NotReadyError:
        if (why := self._down()) is not None:
            return NotReadyError(f"finetuning is down: {why}; restart the server", code=DOWN)
        text = "the finetune service is starting or is being restarted: try again in a few seconds"
        return NotReadyError(text, code=UNAVAILABLE)

    # ---------------------------------------------------------------- the socket
    async def _run(self) -> None:
        said = ""
        while True:
            try:
                if self._context is None:
                    self._context = zmq.asyncio.Context()
                await self._connection(self._context)
                said = ""
            except zmq.ZMQError as error:  # no descriptor is left
                if said != str(error):
                    said = str(error)
                    logger.error(
                        "harli: no socket for calls to the finetune service (%s): tried again", error
                    )
                await asyncio.sleep(OPEN_AGAIN_S)

    async def _connection(self, context: zmq.asyncio.Context) -> None:
        """One connection, from the wait for the service to its loss."""
        with _opened(context, self._endpoint) as (socket, monitor):
            await _event(monitor, zmq.Event.HANDSHAKE_SUCCEEDED)
            self._socket = socket
            reading = asyncio.ensure_future(self._receive(socket))
            lost = asyncio.ensure_future(_event(monitor, zmq.Event.DISCONNECTED))
            try:
                await asyncio.wait([reading, lost], return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._socket = None
                for task in (reading, lost):
                    task.cancel()
                await asyncio.wait([reading, lost])
                await self._drain(socket)
                self._fail_all()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._take(await socket.recv_multipart())

    async def _drain(self, socket: zmq.asyncio.Socket) -> None:
        """Answers that came before the loss was noticed."""
        with contextlib.suppress(zmq.ZMQError):
            while await socket.poll(0):
                self._take(await socket.recv_multipart(zmq.NOBLOCK))

    def _take(self, frames: list[bytes]) -> None:
        try:
            reply: Reply = public.decode(frames[0], Reply)
        except ProtocolError as error:
            logger.error("harli: dropped an answer of the finetune service: %s", error)
            return
        answer = self._waiting.get(reply.id)  # none: its caller has given up
        if answer is not None and not answer.done():
            answer.set_result(reply)

    def _fail_all(self) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._away())


@contextlib.contextmanager
def _opened(
    context: zmq.asyncio.Context, endpoint: str
) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    """A fresh socket that connects, and its monitor.  What a lost one had queued goes with it."""
    socket = context.socket(zmq.DEALER)
    monitor = None
    try:
        for option, value in (
            (zmq.IMMEDIATE, 1),  # nothing is queued for a service that is away
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 0),  # the limits above hold
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 1000),
        ):
            socket.setsockopt(option, value)
        monitor = socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
        socket.connect(endpoint)
        yield socket, monitor
    finally:
        socket.disable_monitor()
        if monitor is not None:
            monitor.close(0)
        socket.close(0)


async def _event(monitor: zmq.asyncio.Socket, wanted: zmq.Event) -> None:
    while parse_monitor_message(await monitor.recv_multipart())["event"] != wanted:
        pass


def _as(kind: Any, reply: Reply) -> Any:
    if not reply.ok:
        raise messages.error(reply)
    try:
        return msgspec.convert(reply.result, kind)
    except msgspec.ValidationError as error:
        raise HarliError(
            f"the finetune service's answer is not understood: {error}", code="internal"
        ) from error


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("harli: calls to the finetune service have stopped", exc_info=task.exception())

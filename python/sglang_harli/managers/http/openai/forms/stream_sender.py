"""A file's bytes on their way to the finetune service, which hashes them: in pieces, a few in
flight."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import deque

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.managers.http.openai.errors import Refusal
from sglang_harli.managers.http.service_calls import ServiceCalls
from sglang_harli.protocol.calls.files import MAX_PIECE_BYTES, FileAppendArgs, StreamAnswer, StreamArgs
from sglang_harli.protocol.public import BUSY

WINDOW = 4  # pieces in flight
APPEND_S = 120.0
BUSY_S = 60.0  # how long a piece is offered to a service that is busy
PAUSE_FIRST_S, PAUSE_LONGEST_S = 0.05, 2.0
ABORT_S = 5.0
SLOW_S = 30.0  # of a slow client less than a piece is sent, so that the service keeps its stream


class StreamSender:
    """One stream to the service, until a verb makes a file or a part of it.

    Args:
        expected: bytes that are announced at most; None: unknown.
        part: it is a part of an upload.

    Attributes:
        stream: the name by which the service knows it; size: bytes that were written.

    ``write`` and ``finish`` raise what the service refuses a piece with.
    """

    def __init__(self, calls: ServiceCalls, *, expected: int | None, part: bool) -> None:
        self._calls = calls
        self._expected = expected or 0
        self._part = part
        self._rest = bytearray()  # less than a piece
        self._sent = 0
        self._sent_at = time.monotonic()
        self._flying: deque[asyncio.Task[None]] = deque()
        self.stream = uuid.uuid4().hex
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Take the next bytes; returns when there is room for more."""
        self.size += len(data)
        self._rest += data
        while len(self._rest) >= MAX_PIECE_BYTES:
            piece = bytes(memoryview(self._rest)[:MAX_PIECE_BYTES])
            del self._rest[:MAX_PIECE_BYTES]
            await self._send(piece)
        if self._rest and time.monotonic() - self._sent_at > SLOW_S:
            await self._send_rest()

    async def _send_rest(self) -> None:
        piece = bytes(self._rest)
        self._rest.clear()
        await self._send(piece)

    async def finish(self) -> None:
        """Returns when the service has all of it."""
        if self._rest:
            await self._send_rest()
        while self._flying:
            await self._landed()

    async def abort(self) -> None:
        """Nothing becomes of it: the service is to forget what it has."""
        for task in self._flying:
            task.cancel()
        if self._flying:
            await asyncio.wait(self._flying)
        for task in self._flying:  # what failed with it
            if not task.cancelled():
                task.exception()
        self._flying.clear()
        if self._sent:
            with contextlib.suppress(HarliError):  # gone: it forgets by itself
                await self._calls.call(
                    "file_abort", StreamArgs(stream=self.stream), object, timeout_s=ABORT_S
                )

    # ---------------------------------------------------------------- pieces
    async def _send(self, piece: bytes) -> None:
        while len(self._flying) >= WINDOW:
            await self._landed()
        self._sent_at = time.monotonic()
        before = self._flying[-1] if self._flying else None
        self._flying.append(asyncio.ensure_future(self._deliver(piece, self._sent, before)))
        self._sent += len(piece)

    async def _landed(self) -> None:
        await self._flying[0]
        self._flying.popleft()

    async def _deliver(self, piece: bytes, offset: int, before: asyncio.Task[None] | None) -> None:
        """Send one piece, and again where the service was busy or lacked the one before."""
        args = FileAppendArgs(stream=self.stream, offset=offset, expected=self._expected, part=self._part)
        loop = asyncio.get_running_loop()
        end, pause_s = loop.time() + BUSY_S, PAUSE_FIRST_S
        while True:
            early = before is not None and not before.done()
            try:
                await self._calls.call("file_append", args, StreamAnswer, [piece], APPEND_S)
                return
            except HarliError as error:
                gap = early and (error.code == NotReadyError.code or error.param == "offset")
                if not gap and (error.code != BUSY or loop.time() + pause_s > end):
                    raise
            if before is not None:
                await asyncio.wait([before])
                if before.cancelled() or before.exception() is not None:
                    raise Refusal("an earlier piece of the file was refused")  # the sender raises that one
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, PAUSE_LONGEST_S)

"""The bytes of a file as a response, read by a thread."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sglang_harli.errors import HarliError, NotFoundError
from sglang_harli.protocol.calls.files import FilePath

PIECE_BYTES = 256 << 10
# Not the event loop's own: a slow disk is to keep nothing else waiting.
_threads = ThreadPoolExecutor(4, "harli-files")


class FileContent(StreamingResponse):
    """An open file, closed when it was sent or the client is gone."""

    def __init__(self, file: BinaryIO, size: int, filename: str) -> None:
        self._file = file
        self._left = size
        self._reading: Future[bytes] | None = None
        super().__init__(
            self._pieces(),
            media_type="application/octet-stream",
            headers={
                "Content-Length": str(size),
                "Content-Disposition": disposition(filename),
                "X-Content-Type-Options": "nosniff",
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._reading is None:
                self._file.close()
            else:  # a thread may still read, and another file may get the descriptor's number
                self._reading.add_done_callback(lambda _done: self._file.close())

    async def _pieces(self) -> AsyncIterator[bytes]:
        while self._left:
            self._reading = _threads.submit(self._file.read, min(self._left, PIECE_BYTES))
            piece = await asyncio.wrap_future(self._reading)
            if not piece:  # cut off meanwhile: the server ends the connection early
                return
            self._left -= len(piece)
            yield piece


async def content(found: FilePath) -> FileContent:
    """The response; it goes on where the file is deleted meanwhile.  NotFoundError: it is gone
    already."""
    try:
        file, size = await asyncio.wrap_future(_threads.submit(_open, found.path))
    except FileNotFoundError as error:
        raise NotFoundError(f"{found.filename} was deleted just now", param="file_id") from error
    except OSError as error:
        raise HarliError(f"{found.filename} cannot be read: {error.strerror}", code="internal") from error
    return FileContent(file, size, found.filename)


def _open(path: str) -> tuple[BinaryIO, int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    file = io.FileIO(descriptor)  # unbuffered: a piece is one read
    return file, os.fstat(descriptor).st_size  # type: ignore[return-value]


def disposition(filename: str) -> str:
    """A Content-Disposition that has the browser save the file, by a name in ASCII and in UTF-8."""
    plain = "".join(
        char if char.isascii() and char.isprintable() and char not in '"\\%' else "_" for char in filename
    )
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"

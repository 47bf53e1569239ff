"""Files on their way in: pieces are written as they come, hashed, and kept when they are whole.

Memory holds the pieces that wait for the disk (the inner socket bounds them), never a file.  A
stream that stands still, or that a crash has left, is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sglang_harli.config import HarliOptions, show_size
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, ProtocolError
from sglang_harli.failpoints import WriteFailpoint, failpoint
from sglang_harli.protocol.calls.files import MAX_PIECE_BYTES, FileAppendArgs
from sglang_harli.protocol.public import BUSY
from sglang_harli.service.pacing import lower_priority

MAX_STREAMS = 64
IDLE_S = 120.0  # the HTTP process ends a stream whose client is gone; this is for when it is gone itself
KEEP_FREE = 64 << 20  # bytes of the disk that files leave for checkpoints and the store


class Whole(NamedTuple):
    """A stream that is whole: its bytes, not yet synced, at ``path``."""

    path: Path
    bytes: int
    sha256: str


@dataclass
class _Stream:
    """A file on its way in."""

    path: Path
    limit: int
    touched: float
    announced: int = 0
    queued: int = 0  # bytes handed to the disk's thread
    received: int = 0  # bytes written by it
    file: BinaryIO | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    writing: asyncio.Future[None] | None = None

    @property
    def claimed(self) -> int:
        return max(self.announced, self.queued)


class Streams:
    """The streams of the HTTP process, in ``folder``; ``stored``: bytes that files and parts have
    already."""

    def __init__(self, folder: Path, options: HarliOptions, stored: Callable[[], int]) -> None:
        self._folder = folder
        self._options = options
        self._stored = stored
        # One thread: pieces of a file stay in order.
        self._disk = ThreadPoolExecutor(1, "streams", initializer=lower_priority, initargs=(10,))
        self._streams: dict[str, _Stream] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def append(self, args: FileAppendArgs, piece: bytes) -> int:
        """One piece; returns how many bytes of the stream have been written.

        Raises:
            HarliError: ``too_large``, ``storage_full`` or ``storage``; the stream is gone then.
            NotReadyError: there is no such stream (any more).
        """
        if not 0 < len(piece) <= MAX_PIECE_BYTES:
            raise ProtocolError(f"a piece has 1 to {MAX_PIECE_BYTES} bytes, this one has {len(piece)}")
        stream = self._streams.get(args.stream)
        if stream is None:
            stream = self._begin(args)
        if args.offset != stream.queued:
            raise ProtocolError(
                f"the stream has {stream.queued} bytes, a piece came for {args.offset}", param="offset"
            )
        stream.touched = time.monotonic()
        try:
            self._check(stream, args, len(piece))
            stream.queued += len(piece)
            loop = asyncio.get_running_loop()
            stream.writing = loop.run_in_executor(self._disk, self._write, stream, piece)
            await asyncio.shield(stream.writing)
        except OSError as error:
            self.drop(args.stream)
            raise storage_error(self._folder.parent, error) from error
        except HarliError:
            self.drop(args.stream)
            raise
        return stream.received

    async def whole(self, name: str, size: int, sha256: str) -> Whole:
        """The stream's bytes, of which the caller is now the owner.

        Raises:
            NotReadyError: no such stream; ProtocolError: it is not of this size or digest.
        """
        stream = self._streams.get(name)
        if stream is not None and stream.writing is not None:
            await asyncio.wait([stream.writing])
        if stream is None or self._streams.get(name) is not stream:
            raise _unknown(name)
        found = stream.digest.hexdigest()
        if stream.received != size or sha256 not in ("", found):
            self.drop(name)
            raise ProtocolError(
                f"the stream has {stream.received} bytes with sha256 {found}, {size} with {sha256 or 'any'} were named",
                code="data_mismatch",
                param="size",
            )
        del self._streams[name]
        if stream.file is not None:
            stream.file.close()
        return Whole(stream.path, stream.received, found)

    def drop(self, name: str) -> None:
        """Remove a stream, if it is there."""
        stream = self._streams.pop(name, None)
        if stream is not None:
            with contextlib.suppress(RuntimeError):  # the service ends: its next start removes it
                self._disk.submit(_remove, stream)  # behind the pieces that are being written

    def sweep(self) -> None:
        """Remove what stands still."""
        now = time.monotonic()
        for name, stream in list(self._streams.items()):
            if now - stream.touched > IDLE_S:
                self.drop(name)

    def close(self) -> None:
        self._disk.shutdown(wait=True, cancel_futures=True)
        for stream in self._streams.values():
            _remove(stream)

    # ---- limits
    def _begin(self, args: FileAppendArgs) -> _Stream:
        if args.offset:
            raise _unknown(args.stream)
        if len(self._streams) >= MAX_STREAMS:
            raise NotReadyError(
                f"{len(self._streams)} files are on their way, at most {MAX_STREAMS} are taken at once: try again in "
                "a moment",
                code=BUSY,
            )
        limit = self._options.part_bytes if args.part else self._options.file_bytes
        stream = _Stream(self._folder / args.stream, limit, time.monotonic(), announced=args.expected)
        self._streams[args.stream] = stream
        return stream

    def _check(self, stream: _Stream, args: FileAppendArgs, piece: int) -> None:
        claimed = max(stream.claimed, stream.queued + piece)
        if claimed > stream.limit:
            flag = "--harli-max-part-size" if args.part else "--harli-max-file-size"
            what = "a part" if args.part else "a file"
            raise ConfigError(
                f"{what} may have {show_size(stream.limit)} ({flag}), and this one has {'more' if not stream.announced else show_size(claimed)}: "
                + (
                    "send smaller parts" if args.part else "split it into several jobs, or compress it (gzip)"
                ),
                code="too_large",
                param="data" if args.part else "file",
            )
        others = sum(other.claimed for other in self._streams.values() if other is not stream)
        self.check_room(claimed, others=others)

    def check_room(self, size: int, *, others: int = 0) -> None:
        """Raises ConfigError (``storage_full``) where files may not have so many bytes more."""
        limit = self._options.all_files_bytes
        held = self._stored() + others
        if held + size > limit:
            raise ConfigError(
                f"all files together may have {show_size(limit)} (--harli-max-files-size), {show_size(held)} are held and "
                f"this one needs {show_size(size)}: delete files that are not needed (jobs keep what they use)",
                code="storage_full",
                param="file",
            )

    # ---- in the disk's thread
    def _write(self, stream: _Stream, piece: bytes) -> None:
        failpoint(WriteFailpoint.FILE)
        if stream.file is None:
            stream.file = stream.path.open("xb", buffering=0)
        left = max(len(piece), stream.announced - stream.received)
        check_free(self._folder, left)
        view = memoryview(piece)
        while view:  # an unbuffered write may take a part
            view = view[stream.file.write(view) :]
        stream.digest.update(piece)
        stream.received += len(piece)


def check_free(folder: Path, size: int) -> None:
    """Raises ConfigError (``storage_full``) where the disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free - KEEP_FREE
    if size > free:
        raise ConfigError(
            f"{show_size(size)} are needed on the disk of {folder}, and {show_size(max(0, free))} are free for files: "
            "make room, then try again",
            code="storage_full",
            param="file",
        )


def storage_error(folder: Path, error: OSError) -> HarliError:
    text = f"the file cannot be stored in {folder} ({error}): make room, then send it again"
    return HarliError(text, code="storage_full", param="file")


def _unknown(name: str) -> NotReadyError:
    return NotReadyError(
        f"the stream {name} is not there any more (the service was restarted, or it stood still): send the file again"
    )


def _remove(stream: _Stream) -> None:
    if stream.file is not None:
        with contextlib.suppress(OSError):
            stream.file.close()
    with contextlib.suppress(OSError):
        os.unlink(stream.path)

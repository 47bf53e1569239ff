"""Uploaded files: chunks are written as they come, hashed, and handed to the submit.

Memory holds the chunks that wait for the disk (the public socket bounds them), never a file.  An
upload has a folder of its own until a submit takes it, over restarts of the service too; one that
stands still for an hour is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from sglang_harli.errors import ConfigError, HarliError, NotFoundError, NotReadyError, ProtocolError
from sglang_harli.failpoints import WriteFailpoint, failpoint
from sglang_harli.protocol.public import BUSY, MAX_DATA_BYTES, MAX_FRAME_BYTES, UploadAnswer, UploadArgs

UPLOADING = ".upload-"
ABOUT = "about.json"  # in an upload's folder: what it is, for a service that is started again
LIFE_S = 3600.0  # of one that stands still
SWEEP_S = 20.0
YIELDS_S = 600.0  # one that stands still for so long makes room for another
MAX_UPLOADS = 64
MAX_BYTES = 16 << 30  # of all uploads together, by their announced sizes
KEEP_FREE = 64 << 20  # bytes of the disk that uploads leave for checkpoints and the store


@dataclass
class _Upload:
    """A file on its way in."""

    filename: str
    size: int
    sha256: str
    folder: Path
    touched: float
    queued: int = 0  # bytes handed to the disk's thread
    received: int = 0  # bytes written by it
    spoken_for: int = 0  # bytes of the disk that others were promised before it
    whole: bool = False  # all bytes are there, and are those announced
    file: BinaryIO | None = None
    digest: Any = field(default_factory=hashlib.sha256)  # None: of an earlier service, to be made
    writing: asyncio.Future[None] | None = None

    @property
    def path(self) -> Path:
        return self.folder / "data"

    def about(self) -> dict[str, Any]:
        return {"filename": self.filename, "size": self.size, "sha256": self.sha256}


def storage_error(run_dir: Path, error: OSError) -> HarliError:
    text = f"the data cannot be stored in {run_dir} ({error}): make room, then submit again"
    return HarliError(text, code="storage")


class Uploads:
    """Files that clients send in pieces, until a submit takes them."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._disk = ThreadPoolExecutor(1, "uploads")  # one thread: chunks of a file stay in order
        self._uploads: dict[str, _Upload] = {}
        for path in run_dir.glob(f"{UPLOADING}*"):
            found = _of_before(path)
            if found is not None:
                self._uploads[path.name.removeprefix(UPLOADING)] = found
            else:
                shutil.rmtree(path, ignore_errors=True)

    async def add(self, args: UploadArgs, frames: Sequence[bytes]) -> UploadAnswer:
        """One chunk, dropped if not the next one; the answer says how far the file has come. Raises
        HarliError: a refusal; the upload is forgotten, unless the service is only busy."""
        if len(frames) != 1 or not 0 < len(frames[0]) <= MAX_FRAME_BYTES:
            raise ProtocolError(f"upload takes one frame of 1 to {MAX_FRAME_BYTES} bytes behind the header")
        upload = self._uploads.get(args.upload)
        if upload is None:
            upload = self._begin(args)
        elif (upload.size, upload.sha256) != (args.size, args.sha256):
            raise ProtocolError(
                f"upload {args.upload} was begun with another size or sha256: choose a new id for another file",
                code="data_mismatch",
                param="upload",
            )
        upload.touched = time.monotonic()
        if args.offset == upload.queued:
            if upload.queued + len(frames[0]) > upload.size:
                self.forget(args.upload)
                raise ProtocolError(
                    f"{args.filename}: more than the {args.size} bytes came that were announced",
                    code="data_mismatch",
                    param="size",
                )
            upload.queued += len(frames[0])
            loop = asyncio.get_running_loop()
            upload.writing = loop.run_in_executor(self._disk, self._write, upload, frames[0])
        if upload.writing is not None:
            try:
                await asyncio.shield(upload.writing)
            except (OSError, HarliError) as error:
                self.forget(args.upload)
                raise storage_error(self._run_dir, error) if isinstance(error, OSError) else error from error
        return UploadAnswer(offset=upload.received)

    async def take(self, upload: str, size: int, sha256: str) -> Path:
        """The whole file, of which the caller is now the owner, its folder included.  Raises
        NotFoundError: no such upload (any more); ProtocolError: not whole, or another file."""
        found = self._uploads.get(upload)
        if found is not None and found.writing is not None:  # a submit may come right behind the last chunk
            await asyncio.wait([found.writing])
        if found is None or self._uploads.get(upload) is not found:
            raise self._unknown(upload)
        if found.digest is None and found.received == found.size:
            await self._compare(upload, found)
        if not found.whole or (found.size, found.sha256) != (size, sha256):
            raise ProtocolError(
                f"upload {upload} holds {found.received} of {found.size} bytes with sha256 {found.sha256}, the submit "
                f"names {size} bytes with sha256 {sha256}",
                code="data_mismatch",
                param="upload",
            )
        del self._uploads[upload]
        return found.path

    async def _compare(self, name: str, upload: _Upload) -> None:
        """One that was whole before the service was started again: is it what was announced?"""
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._finish, upload)
        except (OSError, HarliError) as error:
            self.forget(name)
            raise storage_error(self._run_dir, error) if isinstance(error, OSError) else error from error

    async def run(self) -> None:
        """Remove what stands still."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for name, upload in list(self._uploads.items()):
                if now - upload.touched > LIFE_S:
                    self.forget(name)

    def close(self) -> None:
        self._disk.shutdown(wait=True, cancel_futures=True)
        for upload in self._uploads.values():  # the next start goes on with them
            _close(upload)

    # ---- beginning and ending
    def _begin(self, args: UploadArgs) -> _Upload:
        if args.offset:
            raise self._unknown(args.upload)
        if args.size > MAX_DATA_BYTES:
            raise ConfigError(
                f"{args.filename} has {args.size} bytes; at most {MAX_DATA_BYTES} are accepted: split it into "
                "several jobs",
                code="too_large",
                param="size",
            )
        self._make_room()
        promised = sum(upload.size for upload in self._uploads.values())
        if len(self._uploads) >= MAX_UPLOADS or (promised and promised + args.size > MAX_BYTES):
            raise NotReadyError(
                f"{len(self._uploads)} uploads of {promised} bytes are on their way, at most {MAX_UPLOADS} of "
                f"{MAX_BYTES} bytes are taken at once: try again in a moment",
                code=BUSY,
            )
        missing = sum(upload.size - upload.received for upload in self._uploads.values())
        folder = self._run_dir / f"{UPLOADING}{args.upload}"
        upload = _Upload(args.filename, args.size, args.sha256, folder, time.monotonic(), spoken_for=missing)
        self._uploads[args.upload] = upload
        return upload

    def _make_room(self) -> None:
        if len(self._uploads) >= MAX_UPLOADS:
            name, upload = min(self._uploads.items(), key=lambda item: item[1].touched)
            if time.monotonic() - upload.touched > YIELDS_S:
                self.forget(name)

    def forget(self, name: str | None) -> None:
        """Remove an upload, if it is there."""
        upload = self._uploads.pop(name or "", None)
        if upload is not None:
            with contextlib.suppress(RuntimeError):  # the service ends: it is removed when its life is over
                self._disk.submit(_remove, upload)  # behind the chunks that are being written

    def _unknown(self, upload: str) -> HarliError:
        return NotFoundError(
            f"there is no upload {upload} (any more): begin again at offset 0",
            code="upload_unknown",
            param="upload",
        )

    # ---- in the disk's thread
    @classmethod
    def _write(cls, upload: _Upload, chunk: bytes) -> None:
        failpoint(WriteFailpoint.DATA)
        if upload.file is None:
            _check_room(upload)
            if upload.digest is None:
                upload.digest = _digest(upload.path)
            else:
                upload.folder.mkdir(mode=0o700)
                (upload.folder / ABOUT).write_bytes(orjson.dumps(upload.about()))
            upload.file = upload.path.open("ab", buffering=0)
        view = memoryview(chunk)
        while view:  # an unbuffered write may take a part
            view = view[upload.file.write(view) :]
        upload.digest.update(chunk)
        upload.received += len(chunk)
        if upload.received == upload.size:
            upload.file.close()
            cls._finish(upload)

    @staticmethod
    def _finish(upload: _Upload) -> None:
        if upload.digest is None:
            upload.digest = _digest(upload.path)
        found = upload.digest.hexdigest()
        if found != upload.sha256:
            raise ProtocolError(
                f"upload: its sha256 is {found}, the header says {upload.sha256}",
                code="data_mismatch",
                param="sha256",
            )
        upload.whole = True


def _of_before(folder: Path) -> _Upload | None:
    """An upload of an earlier service, None: its life is over, or nothing can be made of it."""
    try:
        about = orjson.loads((folder / ABOUT).read_bytes())
        info = (folder / "data").stat()
        age = time.time() - info.st_mtime  # stamp: when it was last written to
        if age > LIFE_S or info.st_size > about["size"]:
            return None
        return _Upload(
            about["filename"],
            about["size"],
            about["sha256"],
            folder,
            time.monotonic() - max(0.0, age),
            queued=info.st_size,
            received=info.st_size,
            digest=None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> Any:
    """A sha256 of what is there, which goes on with what comes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest


def _check_room(upload: _Upload) -> None:
    run_dir = upload.folder.parent
    room = shutil.disk_usage(run_dir).free - upload.spoken_for - KEEP_FREE
    if upload.size - upload.received > room:
        raise HarliError(
            f"{upload.filename} has {upload.size} bytes, and {max(0, room)} are free for it in {run_dir}: make room, "
            "then submit again",
            code="storage",
            param="size",
        )


def _close(upload: _Upload) -> None:
    if upload.file is not None:
        with contextlib.suppress(OSError):
            upload.file.close()


def _remove(upload: _Upload) -> None:
    _close(upload)
    shutil.rmtree(upload.folder, ignore_errors=True)

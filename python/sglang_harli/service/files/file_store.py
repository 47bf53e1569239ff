"""Files: their bytes in the run directory, and what clients may ask of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sglang_harli.errors import ConfigError, HarliError, NotFoundError
from sglang_harli.failpoints import FileFailpoint, WriteFailpoint, failpoint
from sglang_harli.protocol.calls.files import (
    FINE_TUNE,
    RESULTS,
    ExpiresAfter,
    FileCompleteArgs,
    FileDeleted,
    FileList,
    FileListArgs,
    FileObject,
    FilePath,
)
from sglang_harli.service.files import records
from sglang_harli.service.files.catalog import Catalog
from sglang_harli.service.files.records import FILE, FileRecord
from sglang_harli.service.files.streams import Streams, Whole, check_free, storage_error
from sglang_harli.service.jobs.folder import fsync_folder

logger = logging.getLogger(__name__)

FILES = "files"  # folder of the run directory
_UNFINISHED = "result-"  # begins the name of a result file that is being written
SWEEP_S = 20.0
MAX_PAGE = 1000  # files of one answer, whatever limit is asked for
T = TypeVar("T")


class FileStore:
    """The files of a run directory.  A file's bytes are durable under their name before the store
    knows the file, and are removed after it has forgotten it; leftovers of a crash go at the next
    start."""

    def __init__(self, run_dir: Path, catalog: Catalog, streams: Streams) -> None:
        self.folder = run_dir / FILES
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._catalog = catalog
        self._streams = streams
        self._disk = ThreadPoolExecutor(2, "files")
        remove_unknown(self.folder, {record.id for record in catalog.files()} | catalog.unreadable)

    def path(self, name: str) -> Path:
        return self.folder / name

    async def in_thread(self, work: Callable[[], T], executor: Executor | None = None) -> T:
        """The result of disk work; an OSError becomes ``storage_full``."""
        try:
            return await asyncio.get_running_loop().run_in_executor(executor or self._disk, work)
        except OSError as error:
            raise storage_error(self.folder.parent, error) from error

    # ---- the verbs
    async def complete(self, args: FileCompleteArgs) -> FileObject:
        """The stream as a file, durable; a repeated key gives the first one.

        Raises:
            ConfigError: another purpose than ``fine-tune``, no bytes, or a key of another request.
        """
        try:
            check_purpose(args.purpose)
        except ConfigError:
            self._streams.drop(args.stream)
            raise
        whole = await self._streams.whole(args.stream, args.size, args.sha256)
        asked = {
            "content": whole.sha256,
            "filename": args.filename,
            "purpose": args.purpose,
            "expires_after": msgspec.to_builtins(args.expires_after),
        }
        try:
            record = await self._catalog.once(
                FileRecord,
                args.idempotency_key,
                asked,
                lambda: self.add(
                    whole,
                    args.filename,
                    args.purpose,
                    expires_after=args.expires_after,
                    key=args.idempotency_key,
                    asked=asked,
                ),
            )
        finally:
            await self.in_thread(lambda: whole.path.unlink(missing_ok=True))
        return record.public()

    async def add(
        self,
        whole: Whole,
        filename: str,
        purpose: str,
        *,
        expires_after: ExpiresAfter | None = None,
        key: str | None = None,
        asked: dict[str, Any] | None = None,
    ) -> FileRecord:
        """A file of these bytes, which move to their place; durable when it returns."""
        record = self.record(whole, filename, purpose, expires_after=expires_after, key=key, asked=asked)
        await self.settle(whole.path, record)
        failpoint(FileFailpoint.FILE_STORED)
        await self._catalog.change([record])
        return record

    def record(
        self,
        whole: Whole,
        filename: str,
        purpose: str,
        *,
        expires_after: ExpiresAfter | None = None,
        key: str | None = None,
        asked: dict[str, Any] | None = None,
    ) -> FileRecord:
        """What the store will have of a file to be."""
        now = int(time.time())  # stamp: of a file
        name, number = self._catalog.new_id(FILE)
        return FileRecord(
            id=name,
            number=number,
            created_at=now,
            filename=filename,
            purpose=purpose,
            bytes=whole.bytes,
            sha256=whole.sha256,
            expires_at=now + expires_after.seconds if expires_after is not None else None,
            key=key,
            asked=asked or {},
        )

    async def settle(self, source: Path, record: FileRecord) -> None:
        """The bytes under the file's name, durable."""
        await self.in_thread(lambda: settle(source, self.path(record.id)))

    def get(self, name: str) -> FileObject:
        return self._catalog.file(name).public()

    def list(self, args: FileListArgs) -> FileList:
        """A page.  ``after`` may name a file that is deleted by now."""
        if args.purpose not in (None, FINE_TUNE, RESULTS):
            raise ConfigError(
                f"purpose={args.purpose!r} is not accepted: give {FINE_TUNE} or {RESULTS}", param="purpose"
            )
        newest, limit = args.order == "desc", min(args.limit, MAX_PAGE)
        at = records.number_of(FILE, args.after, "after") if args.after is not None else None
        found = (
            record
            for record in self._catalog.files(newest=newest)
            if (at is None or (record.number < at if newest else record.number > at))
            and args.purpose in (None, record.purpose)
        )
        page = list(islice(found, limit + 1))
        shown = [record.public() for record in page[:limit]]
        return FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(page) > limit,
        )

    async def delete(self, name: str) -> FileDeleted:
        """Forget the file, then remove its bytes; jobs have their own reference to them."""
        try:
            record = self._catalog.file(name)
        except NotFoundError:
            await self._catalog.durable()  # it may be deleted and not be durably so
            raise
        await self._remove(record)
        return FileDeleted(id=name)

    async def where(self, name: str) -> FilePath:
        """Raises NotFoundError: no such file, or its bytes are gone from the disk."""
        record = self._catalog.file(name)
        path = self.path(name)
        if not await self.in_thread(path.is_file):
            raise _gone(record, path)
        return FilePath(path=str(path), bytes=record.bytes, filename=record.filename)

    # ---- jobs
    def link(self, name: str, place: Path) -> FileRecord:
        """The file's bytes at ``place`` too, whatever becomes of the file (in a thread of the
        caller's).

        Raises:
            NotFoundError: no such file, or its bytes are gone; OSError: the disk.
        """
        record = self._catalog.file(name)
        path = self.path(name)
        try:
            try:
                os.link(path, place)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without hard links
                check_free(place.parent, record.bytes)
                shutil.copyfile(path, place)
        except FileNotFoundError as error:
            raise _gone(record, path) from error
        return record

    async def add_result(
        self, filename: str, write: Callable[[Path], Awaitable[Whole]], *, key: str
    ) -> FileRecord:
        """A file of a job's results, which ``write`` writes to the path that it gets; the same key
        makes none twice."""
        asked = {"filename": filename}

        async def make() -> FileRecord:
            place = self.folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
            try:
                return await self.add(await write(place), filename, RESULTS, key=key, asked=asked)
            finally:
                await self.in_thread(lambda: place.unlink(missing_ok=True))

        return await self._catalog.once(FileRecord, key, asked, make)

    # ---- upkeep
    async def run(self) -> None:
        """Remove what has expired, and streams that stand still."""
        while True:
            self._streams.sweep()
            now = time.time()  # stamp: when a file expires
            for record in list(self._catalog.files()):
                if record.expires_at is not None and record.expires_at <= now:
                    try:
                        await self._remove(record)
                    except HarliError as error:  # of the store: the next round tries again
                        logger.warning("the expired file %s is not removed yet: %s", record.id, error)
            await asyncio.sleep(SWEEP_S)

    async def _remove(self, record: FileRecord) -> None:
        await self._catalog.change(gone=[record])
        with contextlib.suppress(HarliError):  # the next start removes it
            await self.in_thread(lambda: self.path(record.id).unlink(missing_ok=True))

    def close(self) -> None:
        self._disk.shutdown(wait=True, cancel_futures=True)


def check_purpose(purpose: str) -> None:
    if purpose != FINE_TUNE:
        raise ConfigError(
            f"purpose={purpose[:80]!r} is not accepted: files here are for training, give {FINE_TUNE}",
            param="purpose",
        )


def remove_unknown(folder: Path, known: set[str]) -> None:
    """Remove what a crash has left; what is no file of ours, and cannot be removed, stays."""
    for path in folder.iterdir():
        if path.name not in known:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s is none of ours and stays: %s", path, error)


def settle(source: Path, place: Path) -> None:
    """A file under its final name, durable."""
    failpoint(WriteFailpoint.FILE)
    fd = os.open(source, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(source, place)
    fsync_folder(place.parent)


def _gone(record: FileRecord, path: Path) -> NotFoundError:
    return NotFoundError(
        f"the bytes of file {record.id} ({record.filename}) are gone from {path.parent}: delete it and send it again",
        param="file",
    )

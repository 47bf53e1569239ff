"""Uploads: files that come in parts, over an hour at most."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from sglang_harli.config import HarliOptions, show_size
from sglang_harli.errors import ConfigError, HarliError, StateError
from sglang_harli.failpoints import FileFailpoint, WriteFailpoint, failpoint
from sglang_harli.protocol.calls.files import (
    MAX_PARTS,
    PartCompleteArgs,
    UploadCompleteArgs,
    UploadCreateArgs,
    UploadObject,
    UploadPart,
)
from sglang_harli.service.files.catalog import Catalog
from sglang_harli.service.files.file_store import SWEEP_S, FileStore, check_purpose, remove_unknown, settle
from sglang_harli.service.files.records import PART, UPLOAD, PartRecord, UploadRecord
from sglang_harli.service.files.streams import Streams, Whole, check_free

logger = logging.getLogger(__name__)

LIFE_S = 3600  # of an upload that is not completed
KEPT_S = 86400  # how long an upload that has ended is still known
COPY_BYTES = 1 << 20


class UploadStore:
    """The uploads of a run directory; parts lie in files of their own until the upload ends."""

    def __init__(
        self, run_dir: Path, catalog: Catalog, streams: Streams, files: FileStore, options: HarliOptions
    ) -> None:
        self._folder = run_dir / "parts"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._catalog = catalog
        self._streams = streams
        self._files = files
        self._options = options
        self._completing: dict[str, asyncio.Task[UploadObject]] = {}
        self._joiner = ThreadPoolExecutor(1, "join")  # gigabytes, which nothing else waits for
        remove_unknown(self._folder, {record.id for record in catalog.all_parts()} | catalog.unreadable)

    async def create(self, args: UploadCreateArgs) -> UploadObject:
        """Raises ConfigError: the size, the purpose, or an idempotency key of another request."""
        check_purpose(args.purpose)
        limit = self._options.file_bytes
        if args.bytes > limit:
            raise ConfigError(
                f"bytes={args.bytes} is not accepted: a file may have {show_size(limit)} (--harli-max-file-size)",
                code="too_large",
                param="bytes",
            )
        asked = msgspec.to_builtins(args)
        del asked["idempotency_key"]
        record = await self._catalog.once(
            UploadRecord, args.idempotency_key, asked, lambda: self._make(args, asked)
        )
        return self._public(record)

    async def _make(self, args: UploadCreateArgs, asked: dict[str, object]) -> UploadRecord:
        self._streams.check_room(args.bytes)
        now = int(time.time())  # stamp: of an upload
        name, number = self._catalog.new_id(UPLOAD)
        record = UploadRecord(
            id=name,
            number=number,
            created_at=now,
            expires_at=now + LIFE_S,
            filename=args.filename,
            purpose=args.purpose,
            bytes=args.bytes,
            mime_type=args.mime_type,
            expires_after=args.expires_after,
            key=args.idempotency_key,
            asked=asked,
        )
        await self._catalog.change([record])
        return record

    async def add_part(self, args: PartCompleteArgs) -> UploadPart:
        """The stream as a part of the upload, durable.  Raises StateError: the upload has ended."""
        try:
            upload = self._pending(args.upload, "take a part")
            parts = self._catalog.parts(upload.id)
            held = sum(part.bytes for part in parts)
            if len(parts) >= MAX_PARTS:
                raise ConfigError(f"an upload may have {MAX_PARTS} parts", param="data")
        except HarliError:
            self._streams.drop(args.stream)
            raise
        whole = await self._streams.whole(args.stream, args.size, args.sha256)
        asked = {"upload": upload.id, "data": whole.sha256}
        try:
            part = await self._catalog.once(
                PartRecord,
                args.idempotency_key,
                asked,
                lambda: self._make_part(args, whole, held, asked),
            )
        finally:
            await self._files.in_thread(lambda: whole.path.unlink(missing_ok=True))
        return part.public()

    async def _make_part(
        self, args: PartCompleteArgs, whole: Whole, held: int, asked: dict[str, str]
    ) -> PartRecord:
        upload = self._pending(args.upload, "take a part")
        if held + whole.bytes > 2 * self._options.file_bytes:  # parts may be sent anew, in vain
            raise ConfigError(
                f"the parts of upload {upload.id} have {show_size(held + whole.bytes)}, of a file of "
                f"{show_size(upload.bytes)}: cancel it and begin again",
                code="too_large",
                param="data",
            )
        name, number = self._catalog.new_id(PART)
        part = PartRecord(
            id=name,
            number=number,
            upload=upload.id,
            created_at=int(time.time()),  # stamp: of a part
            bytes=whole.bytes,
            key=args.idempotency_key,
            asked=asked,
        )
        await self._files.in_thread(lambda: settle(whole.path, self._folder / part.id))
        failpoint(FileFailpoint.PART_STORED)
        if self._catalog.upload(upload.id).status != "pending":  # ended meanwhile
            await self._files.in_thread(lambda: (self._folder / part.id).unlink(missing_ok=True))
            self._pending(upload.id, "take a part")
        await self._catalog.change([part])
        return part

    async def complete(self, args: UploadCompleteArgs) -> UploadObject:
        """The file of these parts, durable; asking the same again gives the same answer.

        Raises:
            ConfigError: a part is not of this upload, the sizes or the MD5 differ.
            StateError: the upload has ended otherwise, or with other parts.
        """
        upload = self._catalog.upload(args.upload)
        if upload.status == "completed":
            if upload.part_ids != tuple(args.part_ids) or (args.md5 or upload.md5) != upload.md5:
                raise StateError(
                    f"upload {upload.id} is completed, with other part_ids or another md5", param="part_ids"
                )
            await self._catalog.durable()
            return self._public(upload)
        task = self._completing.get(upload.id)
        if task is None:
            self._pending(upload.id, "be completed")
            task = asyncio.ensure_future(self._complete(upload, args))
            self._completing[upload.id] = task
            task.add_done_callback(lambda _done: self._completing.pop(upload.id, None))
        elif not task.done():
            await asyncio.wait([task])
            return await self.complete(args)
        return await asyncio.shield(task)

    async def _complete(self, upload: UploadRecord, args: UploadCompleteArgs) -> UploadObject:
        parts = self._chosen(upload, args.part_ids)
        place = self._folder / f"whole-{upload.id}"
        try:
            whole = await self._files.in_thread(
                lambda: _join([self._folder / part.id for part in parts], place, upload.bytes, args.md5),
                self._joiner,
            )
            file = self._files.record(
                whole, upload.filename, upload.purpose, expires_after=upload.expires_after
            )
            await self._files.settle(place, file)
            failpoint(FileFailpoint.UPLOAD_COMPLETED)
            now = int(time.time())  # stamp: when an upload ended
            ended = msgspec.structs.replace(
                upload,
                status="completed",
                ended_at=now,
                file=file.id,
                part_ids=tuple(args.part_ids),
                md5=args.md5,
            )
            await self._end(ended, [ended, file])
        finally:
            await self._files.in_thread(lambda: place.unlink(missing_ok=True))
        return self._public(ended)

    def _chosen(self, upload: UploadRecord, names: Sequence[str]) -> list[PartRecord]:
        own = {part.id: part for part in self._catalog.parts(upload.id)}
        if len(set(names)) != len(names):
            raise ConfigError("part_ids names a part twice", param="part_ids")
        for index, name in enumerate(names):
            if name not in own:
                raise ConfigError(
                    f"part_ids[{index}]={name[:80]!r} is no part of upload {upload.id}", param="part_ids"
                )
        parts = [own[name] for name in names]
        found = sum(part.bytes for part in parts)
        if found != upload.bytes:
            raise ConfigError(
                f"the parts have {found} bytes, the upload was created for {upload.bytes}", param="part_ids"
            )
        return parts

    async def cancel(self, name: str) -> UploadObject:
        """Ends the upload without a file; asking again gives the same answer."""
        upload = self._catalog.upload(name)
        if upload.status == "cancelled":
            await self._catalog.durable()
            return self._public(upload)
        self._pending(name, "be cancelled")
        if name in self._completing:
            raise StateError(f"upload {name} is being completed", param="upload")
        now = int(time.time())  # stamp: when an upload ended
        ended = msgspec.structs.replace(upload, status="cancelled", ended_at=now)
        await self._end(ended, [ended])
        return self._public(ended)

    async def run(self) -> None:
        """End uploads whose time is over; forget those that ended long ago."""
        while True:
            now = time.time()  # stamp: when an upload expires
            for name in [upload.id for upload in self._catalog.uploads()]:
                try:
                    upload = self._catalog.upload(
                        name
                    )  # as it is now: the one before may have taken its time
                    if upload.status == "pending" and upload.expires_at <= now:
                        if upload.id not in self._completing:
                            ended = msgspec.structs.replace(upload, status="expired", ended_at=int(now))
                            await self._end(ended, [ended])
                    elif upload.ended_at is not None and upload.ended_at + KEPT_S <= now:
                        await self._catalog.change(gone=[upload])
                except HarliError as error:  # of the store: the next round tries again
                    logger.warning("upload %s: its end is not stored yet: %s", name, error)
            await asyncio.sleep(SWEEP_S)

    def close(self) -> None:
        self._joiner.shutdown(wait=True, cancel_futures=True)

    # ---- ends
    async def _end(self, upload: UploadRecord, kept: Sequence[UploadRecord | object]) -> None:
        parts = self._catalog.parts(upload.id)
        await self._catalog.change(kept, parts)  # type: ignore[arg-type]
        with contextlib.suppress(HarliError):  # the next start removes them
            await self._files.in_thread(
                lambda: [(self._folder / part.id).unlink(missing_ok=True) for part in parts]
            )

    def _pending(self, name: str, what: str) -> UploadRecord:
        upload = self._catalog.upload(name)
        over = upload.expires_at <= time.time()  # stamp: when an upload expires
        if upload.status != "pending" or over:
            state = "expired" if upload.status == "pending" else upload.status
            raise StateError(f"upload {name} is {state} and cannot {what}: create another", param="upload")
        return upload

    def _public(self, upload: UploadRecord) -> UploadObject:
        try:
            file = self._files.get(upload.file) if upload.file else None
        except HarliError:  # deleted since
            file = None
        return upload.public(file)


def _join(parts: Sequence[Path], place: Path, size: int, md5: str | None) -> Whole:
    """The parts one behind the other, hashed; ConfigError: the MD5 is another, or the disk is
    full."""
    failpoint(WriteFailpoint.FILE)
    check_free(place.parent, size)
    digest, check, found = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with open(place, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                while piece := source.read(COPY_BYTES):
                    digest.update(piece)
                    check.update(piece)
                    file.write(piece)
                    found += len(piece)
        file.flush()
        os.fsync(file.fileno())
    if md5 is not None and check.hexdigest() != md5.lower():
        raise ConfigError(f"the parts have the MD5 {check.hexdigest()}, md5={md5} was given", param="md5")
    return Whole(place, found, digest.hexdigest())

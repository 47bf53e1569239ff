"""All files, uploads and parts of this run directory, in memory, and the one way to change them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

from sglang_harli.errors import ConfigError, HarliError, NotFoundError
from sglang_harli.service.files import records
from sglang_harli.service.files.records import (
    FILE,
    PART,
    UPLOAD,
    FileRecord,
    PartRecord,
    Record,
    UploadRecord,
)
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import StoredObject

logger = logging.getLogger(__name__)

R = TypeVar("R", FileRecord, UploadRecord, PartRecord)


class Catalog:
    """Loads the objects of the store and keeps them; ``registry`` makes changes durable.

    A record that cannot be read is left aside with a line in the log; its bytes stay where they
    are.
    """

    def __init__(self, registry: JobRegistry) -> None:
        self._registry = registry
        self._records: dict[str, Record] = {}
        self._by_kind: dict[str, dict[str, Record]] = {kind: {} for kind in records.KINDS}
        self._keys: dict[tuple[str, str], str] = {}
        self._making: dict[tuple[str, str], tuple[asyncio.Task[Any], dict[str, Any]]] = {}
        self._number = 0
        self.unreadable: set[str] = set()
        self.bytes = 0  # of all files and parts
        found: list[Record] = []
        for row in registry.store.objects():
            try:
                found.append(records.decoded(row.kind, row.body or ""))
            except HarliError as error:
                logger.error("object %s of the job store cannot be read: %s", row.id, error.message)
                self.unreadable.add(row.id)
        for record in sorted(found, key=lambda record: record.number):
            self._keep(record)

    # ---- reading
    def file(self, name: str) -> FileRecord:
        """Raises NotFoundError."""
        record = self._by_kind[FILE].get(name)
        if not isinstance(record, FileRecord):
            raise NotFoundError(
                f"there is no file {name!r}: it was deleted, has expired, or never was", param="file"
            )
        return record

    def upload(self, name: str) -> UploadRecord:
        """Raises NotFoundError."""
        record = self._by_kind[UPLOAD].get(name)
        if not isinstance(record, UploadRecord):
            raise NotFoundError(f"there is no upload {name!r}", param="upload")
        return record

    def find(self, name: str) -> Record | None:
        return self._records.get(name)

    def files(self, *, newest: bool = False) -> Iterator[FileRecord]:
        """In the order of their numbers, or from the newest back.  Files that come at once are
        kept in another order than they were numbered, and pages go by the number."""
        found = [r for r in self._by_kind[FILE].values() if isinstance(r, FileRecord)]
        return iter(sorted(found, key=lambda record: record.number, reverse=newest))

    def uploads(self) -> list[UploadRecord]:
        return [r for r in self._by_kind[UPLOAD].values() if isinstance(r, UploadRecord)]

    def parts(self, upload: str) -> list[PartRecord]:
        """Of an upload, in the order of their creation."""
        return [r for r in self._by_kind[PART].values() if isinstance(r, PartRecord) and r.upload == upload]

    def all_parts(self) -> list[PartRecord]:
        return [r for r in self._by_kind[PART].values() if isinstance(r, PartRecord)]

    # ---- changing
    def new_id(self, kind: str) -> tuple[str, int]:
        """An id that no object has, and the number in it."""
        self._number += 1
        return records.new_id(kind, self._number), self._number

    async def change(self, kept: Iterable[Record] = (), gone: Iterable[Record] = ()) -> None:
        """These records from now on, and these no more, in one durable step.

        Raises:
            NotReadyError: it is not known to be durable yet (see ``JobRegistry.durable``).
        """
        kept, gone = list(kept), list(gone)
        rows = [StoredObject(record.id, record.kind, records.encoded(record)) for record in kept]
        rows += [StoredObject(record.id, record.kind, None) for record in gone]
        for record in kept:
            self._keep(record)
        for record in gone:
            self._drop(record)
        await self._registry.durable(self._registry.journal.put(objects=rows))

    def _keep(self, record: Record) -> None:
        before = self._records.get(record.id)
        self.bytes += _stored(record) - (_stored(before) if before is not None else 0)
        self._records[record.id] = record
        self._by_kind[record.kind][record.id] = record
        self._number = max(self._number, record.number)
        if record.key is not None:
            self._keys[record.kind, record.key] = record.id

    def _drop(self, record: Record) -> None:
        found = self._records.pop(record.id, None)
        if found is None:
            return
        self.bytes -= _stored(found)
        self._by_kind[found.kind].pop(found.id, None)
        if found.key is not None and self._keys.get((found.kind, found.key)) == found.id:
            del self._keys[found.kind, found.key]

    async def durable(self) -> None:
        """Wait until all changes so far are durable: what is answered again is not lost."""
        await self._registry.durable()

    async def once(
        self, kind: type[R], key: str | None, asked: dict[str, Any], make: Callable[[], Awaitable[R]]
    ) -> R:
        """What ``make`` makes, or what an earlier call with this idempotency key has made.

        Raises:
            ConfigError: the key stands for something else (code ``idempotency_conflict``).
        """
        if key is None:
            return await asyncio.shield(asyncio.ensure_future(make()))
        name = (kind.kind, key)
        task, first = self._making.get(name, (None, {}))
        if task is not None:
            _check_same(key, asked, first)
            return await asyncio.shield(task)
        known = self._records.get(self._keys.get(name, ""))
        if isinstance(known, kind):
            _check_same(key, asked, known.asked)
            await self.durable()
            return known
        task = asyncio.ensure_future(make())
        self._making[name] = task, asked
        task.add_done_callback(lambda _done: self._making.pop(name, None))
        return await asyncio.shield(task)


def _stored(record: Record) -> int:
    """Bytes that the object holds on the disk."""
    return 0 if isinstance(record, UploadRecord) else record.bytes


def _check_same(key: str, asked: dict[str, Any], first: dict[str, Any]) -> None:
    other = [name for name in asked if asked[name] != first.get(name)]
    if other:
        raise ConfigError(
            f"the idempotency key {key!r} belongs to a request with another {', '.join(other)}: "
            "give each request a key of its own",
            code="idempotency_conflict",
            param="idempotency_key",
        )

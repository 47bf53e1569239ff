"""What the store keeps of files, uploads and their parts.

An id holds the object's number, so that a list can go on behind an object that is deleted by then.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Literal

import msgspec
from msgspec import Struct

from sglang_harli.errors import HarliError, NotFoundError
from sglang_harli.protocol.calls.files import ExpiresAfter, FileObject, UploadObject, UploadPart

FILE, UPLOAD, PART = "file", "upload", "part"  # kinds of objects
_PREFIXES = {FILE: "file-", UPLOAD: "upload_", PART: "part_"}
_DIGITS = 10  # of the number in an id

Status = Literal["pending", "completed", "cancelled", "expired"]


class FileRecord(Struct, kw_only=True, frozen=True):
    """A file whose bytes are in the run directory.  ``asked``: what its idempotency key stands
    for."""

    id: str
    number: int
    created_at: int
    filename: str
    purpose: str
    bytes: int
    sha256: str
    expires_at: int | None = None
    key: str | None = None
    asked: dict[str, Any] = {}

    kind = FILE

    def public(self) -> FileObject:
        return FileObject(
            id=self.id,
            bytes=self.bytes,
            created_at=self.created_at,
            expires_at=self.expires_at,
            filename=self.filename,
            purpose=self.purpose,
        )


class PartRecord(Struct, kw_only=True, frozen=True):
    """A part of an upload whose bytes are in the run directory until the upload ends."""

    id: str
    number: int
    upload: str
    created_at: int
    bytes: int
    key: str | None = None
    asked: dict[str, Any] = {}

    kind = PART

    def public(self) -> UploadPart:
        return UploadPart(id=self.id, created_at=self.created_at, upload_id=self.upload)


class UploadRecord(Struct, kw_only=True, frozen=True):
    """A file that comes in parts.  ``part_ids`` and ``file``: of a completed one."""

    id: str
    number: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    bytes: int
    mime_type: str = ""
    expires_after: ExpiresAfter | None = None
    status: Status = "pending"
    ended_at: int | None = None
    file: str | None = None
    part_ids: tuple[str, ...] = ()
    md5: str | None = None
    key: str | None = None
    asked: dict[str, Any] = {}

    kind = UPLOAD

    def public(self, file: FileObject | None) -> UploadObject:
        return UploadObject(
            id=self.id,
            bytes=self.bytes,
            created_at=self.created_at,
            expires_at=self.expires_at,
            filename=self.filename,
            purpose=self.purpose,
            status=self.status,
            file=file,
        )


Record = FileRecord | UploadRecord | PartRecord
KINDS: dict[str, type[Record]] = {FILE: FileRecord, UPLOAD: UploadRecord, PART: PartRecord}


def new_id(kind: str, number: int) -> str:
    return f"{_PREFIXES[kind]}{number:0{_DIGITS}x}{secrets.token_hex(12)}"


def number_of(kind: str, name: str, param: str) -> int:
    """The number in an id; raises NotFoundError: it is no id of this kind."""
    found = re.fullmatch(rf"{_PREFIXES[kind]}([0-9a-f]{{{_DIGITS}}})[0-9a-f]{{24}}", name)
    if found is None:
        raise NotFoundError(f"there is no {kind} {name[:128]!r}", param=param)
    return int(found[1], 16)


def encoded(record: Record) -> str:
    return msgspec.json.encode(record).decode()


def decoded(kind: str, body: str) -> Record:
    """Raises HarliError: it is no record of this kind."""
    try:
        return msgspec.json.decode(body, type=KINDS[kind])
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise HarliError(f"it is no {kind}: {error}", code="unreadable") from error

"""Files and uploads as OpenAI's API has them: the objects, and the arguments of the verbs by which
the HTTP process asks the service for them.  These verbs are served on the inner endpoint alone
(``run_paths.verbs_endpoint``).

A file or a part comes as a stream: ``file_append`` piece by piece, then ``file_complete`` or
``part_complete``, or ``file_abort``.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from sglang_harli.protocol import accepted
from sglang_harli.protocol.public import MAX_FRAME_BYTES, ObjectId

VERBS = (
    "file_append",
    "file_complete",
    "file_abort",
    "file_get",
    "file_list",
    "file_delete",
    "file_path",
    "part_complete",
    "upload_create",
    "upload_complete",
    "upload_cancel",
)
MAX_PIECE_BYTES = MAX_FRAME_BYTES  # of the data frame behind one ``file_append``
FINE_TUNE = "fine-tune"  # the one purpose that clients' files have
RESULTS = "fine-tune-results"  # of files that jobs make
MAX_PARTS = 10_000  # of one upload

StreamId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z"), accepted.words("32 hex digits")]
FileName = Annotated[str, Meta(min_length=1, max_length=1024)]
Key = Annotated[str, Meta(pattern=r"^[ -~]{1,128}\Z"), accepted.words("1 to 128 printable ASCII characters")]
Digest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z"), accepted.words("64 hex digits")]


class ExpiresAfter(Struct, frozen=True, forbid_unknown_fields=True):
    """When a file is removed: ``seconds`` (an hour to 30 days) after it was created."""

    anchor: Annotated[str, Meta(pattern=r"^created_at\Z"), accepted.words("created_at")]
    seconds: Annotated[int, Meta(ge=3600, le=2_592_000)]


class FileObject(Struct, kw_only=True):
    """A file; times in seconds of the Unix clock, UTC.  ``status`` is always ``processed``: what
    is in a file is checked when a job uses it."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: str | None = None


class UploadObject(Struct, kw_only=True):
    """A file that comes in parts; ``status``: pending, completed, cancelled or expired."""

    id: str
    object: str = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None = None


class UploadPart(Struct, kw_only=True):
    """A part of an upload."""

    id: str
    object: str = "upload.part"
    created_at: int
    upload_id: str


class FileList(Struct, kw_only=True):
    """A page of files."""

    object: str = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Struct, kw_only=True):
    """The answer to ``file_delete``."""

    id: str
    object: str = "file"
    deleted: bool = True


class FilePath(Struct, kw_only=True):
    """Where a file's bytes lie on this machine, for the process that sends them."""

    path: str
    bytes: int
    filename: str


class StreamAnswer(Struct, kw_only=True):
    """``offset``: bytes of the stream that have been received, from its beginning."""

    offset: int


class FileAppendArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``file_append``: one data frame follows, the bytes from ``offset`` on; offset 0 begins the
    stream.  ``expected``: bytes that are announced at most (0: unknown), refused before they come.
    ``part``: of an upload, so the limit of a part holds."""

    stream: StreamId
    offset: Annotated[int, Meta(ge=0)]
    expected: Annotated[int, Meta(ge=0)] = 0
    part: bool = False


class FileCompleteArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``file_complete``: the stream is whole and becomes a file.  ``sha256``: "" is not checked."""

    stream: StreamId
    filename: FileName
    purpose: str
    size: Annotated[int, Meta(ge=0)]
    sha256: Digest = ""
    expires_after: ExpiresAfter | None = None
    idempotency_key: Key | None = None


class StreamArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``file_abort``: the stream ends without a file."""

    stream: StreamId


class FileArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``file_get``, ``file_delete``, ``file_path``."""

    file: ObjectId


class FileListArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``file_list``: a page; ``after``: the last id of the page before, which may be deleted."""

    purpose: Annotated[str, Meta(extra_json_schema={"enum": [FINE_TUNE, RESULTS]})] | None = None
    after: ObjectId | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Annotated[str, Meta(pattern=r"^(asc|desc)\Z"), accepted.words("asc or desc")] = "desc"


class UploadCreateArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``upload_create``: ``bytes`` is the size of the whole file."""

    filename: FileName
    purpose: str
    bytes: Annotated[int, Meta(ge=1)]
    mime_type: Annotated[str, Meta(max_length=255)] = ""
    expires_after: ExpiresAfter | None = None
    idempotency_key: Key | None = None


class PartCompleteArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``part_complete``: the stream is whole and becomes a part of the upload."""

    stream: StreamId
    upload: ObjectId
    size: Annotated[int, Meta(ge=0)]
    sha256: Digest = ""
    idempotency_key: Key | None = None


class UploadCompleteArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``upload_complete``: the parts, in this order, are the file.  ``md5``: of the whole file."""

    upload: ObjectId
    part_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_PARTS)]
    md5: (
        Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{32}\Z"), accepted.words("an MD5 of 32 hex digits")] | None
    ) = None


class UploadCancelArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``upload_cancel``."""

    upload: ObjectId

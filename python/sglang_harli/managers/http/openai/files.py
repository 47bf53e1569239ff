"""``/v1/files``: training files, as the openai client sends, lists, reads and deletes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from sglang_harli.errors import HarliError
from sglang_harli.managers.http.openai import schemas
from sglang_harli.managers.http.openai.body import convert, idempotency_key, query
from sglang_harli.managers.http.openai.content import content
from sglang_harli.managers.http.openai.endpoint import Api, answer, object_id, referred
from sglang_harli.managers.http.openai.forms.form_stream import Form, FormKind
from sglang_harli.protocol import accepted
from sglang_harli.protocol.calls import files
from sglang_harli.protocol.calls.files import (
    ExpiresAfter,
    FileArgs,
    FileCompleteArgs,
    FileDeleted,
    FileList,
    FileListArgs,
    FileObject,
    FilePath,
)

TAG = "Files"
COMPLETE_S = 600.0  # a large file is made durable
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
EXPIRY = {ANCHOR: "anchor", SECONDS: "seconds"}
_SHAPE = schemas.schema(ExpiresAfter)["properties"]
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [files.FINE_TUNE]},
        ANCHOR: _SHAPE["anchor"],
        SECONDS: _SHAPE["seconds"],
    },
}


class FileFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a form says besides its file."""

    purpose: str
    expires_after: ExpiresAfter | None = None


def check_purpose(given: str) -> None:
    """ConfigError: not a purpose that clients' files have."""
    if given != files.FINE_TUNE:
        raise accepted.refused("purpose", given, files.FINE_TUNE)


def _field(name: str, lax: bool = False) -> Callable[[str], object]:
    types = {field.name: field.type for field in msgspec.structs.fields(ExpiresAfter)}
    return lambda text: accepted.value(f"expires_after[{name}]", text, types[name], lax=lax)


def _parse(fields: dict[str, str]) -> FileFields:
    found: dict[str, Any] = {name: text for name, text in fields.items() if name == "purpose"}
    expiry = {name: fields[key] for key, name in EXPIRY.items() if key in fields}
    return convert(found | ({"expires_after": expiry} if expiry else {}), FileFields, lax=True)


def form_kind(api: Api) -> FormKind:
    """The form of a file."""
    return FormKind(
        file="file",
        fields={"purpose": check_purpose, ANCHOR: _field("anchor"), SECONDS: _field("seconds", lax=True)},
        parse=_parse,
        limit=api.options.file_bytes,
        flag="--harli-max-file-size",
    )


async def completed(api: Api, form: Form, verb: str, args: Any, kind: Any) -> Response:
    """The service makes of a form's stream what ``verb`` says, or forgets it."""
    try:
        return answer(await api.calls.call(verb, args, kind, timeout_s=COMPLETE_S))
    except HarliError:
        await form.sender.abort()
        raise


def add(router: APIRouter, api: Api) -> None:
    """Add the routes to a guarded router."""
    kind = form_kind(api)

    async def create_file(request: Request) -> Response:
        """Send a training file.  It is kept until it is deleted, or expires."""
        query(request, None)
        key = idempotency_key(request)
        form = await api.forms.read(request, kind)
        args = FileCompleteArgs(
            stream=form.sender.stream,
            filename=form.filename,
            purpose=form.values.purpose,
            size=form.sender.size,
            expires_after=form.values.expires_after,
            idempotency_key=key,
        )
        return await completed(api, form, "file_complete", args, FileObject)

    async def list_files(request: Request) -> Response:
        """A page of the files, newest first."""
        args = query(request, FileListArgs)
        with referred("after"):
            return answer(await api.calls.call("file_list", args, FileList))

    async def retrieve_file(request: Request) -> Response:
        """One file's object."""
        return answer(await api.calls.call("file_get", _file(request), FileObject))

    async def delete_file(request: Request) -> Response:
        """Delete a file."""
        return answer(await api.calls.call("file_delete", _file(request), FileDeleted))

    async def download_file(request: Request) -> Response:
        """A file's bytes."""
        return await content(await api.calls.call("file_path", _file(request), FilePath))

    ids = ("file_id",)
    described = schemas.route("createFile", TAG, "POST", FileObject, form=FORM)
    router.add_api_route("/v1/files", create_file, **described)
    described = schemas.route("listFiles", TAG, "GET", FileList, query=FileListArgs, refers=True)
    router.add_api_route("/v1/files", list_files, **described)
    described = schemas.route("retrieveFile", TAG, "GET", FileObject, ids=ids)
    router.add_api_route("/v1/files/{file_id}", retrieve_file, **described)
    described = schemas.route("deleteFile", TAG, "DELETE", FileDeleted, ids=ids)
    router.add_api_route("/v1/files/{file_id}", delete_file, **described)
    described = schemas.route("downloadFile", TAG, "GET", None, ids=ids)
    router.add_api_route("/v1/files/{file_id}/content", download_file, **described)


def _file(request: Request) -> FileArgs:
    query(request, None)
    return FileArgs(file=object_id(request, "file_id", "file"))

"""``/v1/uploads``: a file that comes in parts, as the openai client's ``upload_file_chunked`` sends
one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from sglang_harli.managers.http.openai import schemas
from sglang_harli.managers.http.openai.body import convert, idempotency_key, json_object, query
from sglang_harli.managers.http.openai.endpoint import Api, answer, object_id
from sglang_harli.managers.http.openai.files import check_purpose, completed
from sglang_harli.managers.http.openai.forms.form_parser import display_name
from sglang_harli.managers.http.openai.forms.form_stream import FormKind
from sglang_harli.protocol import accepted
from sglang_harli.protocol.calls.files import (
    FINE_TUNE,
    MAX_PARTS,
    ExpiresAfter,
    FileName,
    PartCompleteArgs,
    UploadCancelArgs,
    UploadCompleteArgs,
    UploadCreateArgs,
    UploadObject,
    UploadPart,
)

TAG = "Uploads"
COMPLETE_S = 3600.0  # the parts are put together, which takes its time
FORM = {
    "type": "object",
    "required": ["data"],
    "additionalProperties": False,
    "properties": {"data": {"type": "string", "format": "binary"}},
}


# The document says which there are; ``check_purpose`` refuses others.
Purpose = Annotated[str, Meta(extra_json_schema={"enum": [FINE_TUNE]})]


class CreateBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``POST /v1/uploads`` takes; ``bytes``: of the whole file."""

    filename: FileName
    purpose: Purpose
    bytes: Annotated[int, Meta(ge=1)]
    mime_type: Annotated[str, Meta(max_length=255)] = ""
    expires_after: ExpiresAfter | None = None


class CompleteBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``POST /v1/uploads/{upload_id}/complete`` takes: the parts in their order."""

    part_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_PARTS)]
    md5: (
        Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{32}\Z"), accepted.words("an MD5 of 32 hex digits")] | None
    ) = None


class EmptyBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """No body, or an empty object."""


def _nothing(_fields: dict[str, str]) -> None:
    return None


def add(router: APIRouter, api: Api) -> None:
    """Add the routes to a guarded router."""
    kind = FormKind(
        file="data",
        fields={},
        parse=_nothing,
        limit=api.options.part_bytes,
        flag="--harli-max-part-size",
        part=True,
    )

    async def create_upload(request: Request) -> Response:
        """Begin an upload: its parts follow."""
        query(request, None)
        key = idempotency_key(request)
        body = convert(await json_object(request), CreateBody)
        check_purpose(body.purpose)
        args = UploadCreateArgs(
            filename=display_name(body.filename),
            purpose=body.purpose,
            bytes=body.bytes,
            mime_type=body.mime_type,
            expires_after=body.expires_after,
            idempotency_key=key,
        )
        return answer(await api.calls.call("upload_create", args, UploadObject))

    async def add_upload_part(request: Request) -> Response:
        """Send a part; several may come at once."""
        upload = _upload(request)
        key = idempotency_key(request)
        form = await api.forms.read(request, kind)
        args = PartCompleteArgs(
            stream=form.sender.stream,
            upload=upload,
            size=form.sender.size,
            idempotency_key=key,
        )
        return await completed(api, form, "part_complete", args, UploadPart)

    async def complete_upload(request: Request) -> Response:
        """Put the parts together: the answer has the file."""
        upload = _upload(request)
        idempotency_key(request)  # a repeated one answers the same in any case
        body = convert(await json_object(request), CompleteBody)
        args = UploadCompleteArgs(upload=upload, part_ids=body.part_ids, md5=body.md5)
        return answer(await api.calls.call("upload_complete", args, UploadObject, timeout_s=COMPLETE_S))

    async def cancel_upload(request: Request) -> Response:
        """Give an upload up; its parts are removed."""
        upload = _upload(request)
        idempotency_key(request)
        convert(await json_object(request), EmptyBody)
        return answer(await api.calls.call("upload_cancel", UploadCancelArgs(upload=upload), UploadObject))

    routes = (create_upload, add_upload_part, complete_upload, cancel_upload)
    for route, (path, described) in zip(routes, _described(), strict=True):
        router.add_api_route(path, route, **described)


def _described() -> tuple[tuple[str, dict[str, Any]], ...]:
    one, ids = "/v1/uploads/{upload_id}", ("upload_id",)
    create = schemas.route("createUpload", TAG, "POST", UploadObject, body=CreateBody)
    part = schemas.route("addUploadPart", TAG, "POST", UploadPart, ids=ids, form=FORM)
    complete = schemas.route("completeUpload", TAG, "POST", UploadObject, ids=ids, body=CompleteBody)
    cancel = schemas.route("cancelUpload", TAG, "POST", UploadObject, ids=ids, body=EmptyBody)
    return (
        ("/v1/uploads", create),
        (f"{one}/parts", part),
        (f"{one}/complete", complete),
        (f"{one}/cancel", cancel),
    )


def _upload(request: Request) -> str:
    query(request, None)
    return object_id(request, "upload_id", "upload")

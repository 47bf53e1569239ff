"""The routes' part of SGLang's /openapi.json, from the Structs that they read and answer with."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Struct
from starlette.responses import Response

JSON = "application/json"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "harli": {
                    "type": "object",
                    "description": "More of the same report, such as one row per line.",
                },
            },
        }
    },
}
ALWAYS = (400, 401, 403, 429, 500, 503)  # statuses that each route may answer
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A POST that is repeated with the same key is done once.",
    "schema": {"type": "string", "pattern": "^[ -~]{1,128}$"},
}


def schema(kind: type[Struct]) -> dict[str, Any]:
    """The JSON schema of a Struct, whole, without references."""
    whole = msgspec.json.schema(kind)
    defined = whole.get("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return inline(defined[part["$ref"].rsplit("/", 1)[-1]])
            return {name: inline(value) for name, value in part.items()}
        if isinstance(part, list):
            return [inline(item) for item in part]
        return part.replace("\\Z", "$") if isinstance(part, str) else part

    found: dict[str, Any] = inline({name: value for name, value in whole.items() if name != "$defs"})
    return found


def route(
    name: str,
    tag: str,
    method: str,
    answer: type[Struct] | None,
    *,
    ids: Sequence[str] = (),
    query: type[Struct] | None = None,
    body: type[Struct] | None = None,
    form: dict[str, Any] | None = None,
    refers: bool = False,
) -> dict[str, Any]:
    """The arguments of ``add_api_route`` that say what a route is.

    Args:
        name: the operation, in OpenAI's words.
        answer: the Struct of the response; None: a file's bytes.
        ids: parameters of the path.
        query, body: Structs; form: the schema of a multipart form.
        refers: the query or the body names an object, which may not be there.
    """
    parameters = [_parameter(name, "path", {"type": "string", "minLength": 1}, True) for name in ids]
    if query is not None:
        shape = schema(query)
        parameters += [_parameter(name, "query", part, False) for name, part in shape["properties"].items()]
    if method == "POST":
        parameters.append(_KEY)
    extra: dict[str, Any] = {"parameters": parameters}
    if body is not None:
        shape = schema(body)
        extra["requestBody"] = {"required": bool(shape["required"]), "content": {JSON: {"schema": shape}}}
    if form is not None:
        extra["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    statuses = [*ALWAYS, *([404] if ids or refers else []), *([408, 413] if method == "POST" else [])]
    found = _BINARY if answer is None else {JSON: {"schema": schema(answer)}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "OK", "content": found}}
    for status in sorted(statuses):
        responses[status] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": ERROR}}}
    return {
        "methods": [method],
        "operation_id": name,
        "tags": [tag],
        "response_class": Response,
        "responses": responses,
        "openapi_extra": extra,
    }


def _parameter(name: str, place: str, shape: dict[str, Any], required: bool) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": shape}

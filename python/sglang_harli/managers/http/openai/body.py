"""What a request says outside its path: a bounded JSON body, the query and the idempotency key.

Values become the Structs of ``protocol``.  A field or parameter that is not declared is refused,
not dropped: the openai client's ``extra_body`` reaches only what a route documents.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

import msgspec
import orjson
from msgspec import Struct, inspect
from starlette.requests import Request

from sglang_harli.errors import SHOWN, ConfigError, shown
from sglang_harli.managers.http.openai.errors import Refusal
from sglang_harli.protocol import accepted
from sglang_harli.protocol.calls.files import Key

S = TypeVar("S", bound=Struct)

MAX_JSON_BYTES = 1 << 20
MAX_DEPTH = 32  # of objects and lists in each other
MAX_PARAMETERS = 32
IDLE_S = 120.0  # between two pieces of a body


# ------------------------------------------------------------------ the body
async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes.

    Raises:
        Refusal: nothing comes for IDLE_S seconds (408).
        starlette.requests.ClientDisconnect: the connection is gone.
    """
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                piece = await anext(stream, None)
        except TimeoutError as error:
            text = f"the body did not go on for {IDLE_S:g} s"
            raise Refusal(text, status=408, code="timeout", headers={"Connection": "close"}) from error
        if piece is None:
            return
        if piece:
            yield piece


def announced(request: Request) -> int | None:
    """Bytes of the body by its Content-Length; None: it does not say."""
    length = request.headers.get("content-length")
    return int(length) if length is not None and re.fullmatch(r"[0-9]{1,18}", length) else None


def too_large(limit: int, what: str, flag: str | None = None) -> Refusal:
    raised = f" (the server's {flag})" if flag else ""
    return Refusal(f"{what} is too large: at most {limit:,} bytes{raised}", status=413, code="too_large")


async def json_object(request: Request) -> dict[str, Any]:
    """The body's JSON object; none at all is an empty one.

    Raises:
        Refusal: larger than MAX_JSON_BYTES (413), or no JSON object in UTF-8 (400).
    """
    if (announced(request) or 0) > MAX_JSON_BYTES:
        raise too_large(MAX_JSON_BYTES, "the body")
    body = bytearray()
    async for piece in pieces(request):
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise too_large(MAX_JSON_BYTES, "the body")
    if not body:
        return {}
    _check_json_type(request)
    try:
        found = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise Refusal(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else shown(found)
        raise Refusal(f"the body is {kind}: send a JSON object", code="invalid_json")
    check_tree(found)
    return found


def _check_json_type(request: Request) -> None:
    given = request.headers.get("content-type", "application/json")
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(
            f"the Content-Type is {shown(given)}: send application/json", code="invalid_content_type"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise Refusal(f"the charset is {shown(value)}: send UTF-8", code="invalid_content_type")


def check_tree(found: Any) -> None:
    """Refuse what is nested too deep, and texts with NUL, which no store and no log takes."""
    level = [found]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if any("\0" in name for name in value):
                    raise Refusal("a name holds a NUL character: take it out")
                for name, item in value.items():
                    if isinstance(item, str) and "\0" in item:
                        _refuse_nul(name)
                below += [item for item in value.values() if isinstance(item, dict | list)]
            else:
                for item in value:
                    if isinstance(item, str) and "\0" in item:
                        _refuse_nul(None)
                below += [item for item in value if isinstance(item, dict | list)]
        if not below:
            return
        level = below
    raise Refusal(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def _refuse_nul(name: str | None) -> NoReturn:
    param = None if name is None else name[:SHOWN]
    raise Refusal(f"{param or 'a text'} holds a NUL character: take it out", param=param)


# ------------------------------------------------------------------ as a Struct
def convert(values: Mapping[str, Any], kind: type[S], *, lax: bool = False, where: str = "") -> S:
    """Values as ``kind``, objects in them too; ``lax``: numbers may come as texts.

    Raises:
        ConfigError: unknown, missing or bad; ``param`` is the field's path.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown field {shown(f'{where}{name}')}; accepted: {', '.join(f'{where}{n}' for n in fields)}",
                param=f"{where}{name}"[:SHOWN],
                code="unknown_parameter",
            )
    found: dict[str, Any] = {}
    for name, field in fields.items():
        path = f"{where}{name}"
        inner = _struct_in(field.type)
        if name not in values:
            if field.required:
                text = f"{path} is missing: give {'an object' if inner else accepted.wording(field.type)}"
                raise ConfigError(text, param=path, code="missing_required_parameter")
            continue
        given = values[name]
        if inner is not None and given is not None:
            if not isinstance(given, Mapping):
                raise accepted.refused(path, given, "an object")
            given = convert(given, inner, lax=lax, where=f"{path}.")
            found[field.name] = given
        else:
            found[field.name] = accepted.value(path, given, field.type, lax=lax)
    return kind(**found)


def _struct_in(kind: Any) -> type[Struct] | None:
    """The Struct of a field that is one, or one or none."""
    info = inspect.type_info(kind)
    for part in info.types if isinstance(info, inspect.UnionType) else (info,):
        if isinstance(part, inspect.StructType):
            return part.cls
    return None


# ------------------------------------------------------------------ beside the body
def query(request: Request, kind: type[S] | None, *, maps: Sequence[str] = ()) -> S | None:
    """The query's parameters as ``kind`` (None: there are none).  ``maps``: fields that come as
    ``field[NAME]=VALUE``.  ConfigError: unknown, repeated or bad."""
    try:
        pairs = parse_qsl(
            request.scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except ValueError as error:
        raise ConfigError("the query is not in UTF-8, or has too many parameters") from error
    values = dict(pairs)
    for name in values:
        if sum(name == other for other, _ in pairs) > 1:
            raise ConfigError(f"{shown(name)} is given more than once", param=name[:SHOWN])
        if kind is None:
            text = f"unknown parameter {shown(name)}: there are none here"
            raise ConfigError(text, param=name[:SHOWN], code="unknown_parameter")
    check_tree(values)
    return None if kind is None else convert(_mapped(values, maps), kind, lax=True)


def _mapped(values: dict[str, str], maps: Sequence[str]) -> dict[str, Any]:
    """Parameters such as ``metadata[a]`` as one object of their field."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        field, bracket, inner = name.partition("[")
        if bracket and inner.endswith("]") and field in maps:
            if field in values:
                raise ConfigError(f"{field} and {shown(name)} are given: give one of the two", param=field)
            found.setdefault(field, {})[inner[:-1]] = value
        else:
            found[name] = value
    return found


def idempotency_key(request: Request) -> str | None:
    """The header ``Idempotency-Key``: a POST that is repeated with it is done once."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError("Idempotency-Key is given more than once", param="Idempotency-Key")
    key: str = accepted.value("Idempotency-Key", given[0], Key)
    return key

"""Requests as they are sent, and what a reply means: a result, or an error of its own type."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from sglang_harli import errors
from sglang_harli.errors import ConfigError, HarliError, NotFoundError, NotReadyError, ProtocolError
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.public import BUSY, Reply, Request

ERRORS: dict[str, type[HarliError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HarliError) and kind is not HarliError
}
ERRORS |= {  # refusals with a code of their own
    "memory_budget": ConfigError,
    "idempotency_conflict": ConfigError,
    "unsupported_version": ProtocolError,
    "data_mismatch": ProtocolError,
    "upload_unknown": NotFoundError,
    BUSY: NotReadyError,
    "finetune_down": NotReadyError,
}


def header(verb: str, args: Any) -> Request:
    """A request.

    Raises:
        ConfigError: one of its arguments is not accepted; the service says the same.
    """
    if isinstance(args, msgspec.Struct):
        accepted.check(args)
    return Request(v=public.VERSION, id=uuid.uuid4().hex, verb=verb, args=msgspec.to_builtins(args))


def reply(payload: bytes, request_id: str) -> Reply | None:
    """The reply in a frame, None if it answers another request."""
    found: Reply = public.decode(payload, Reply)
    return found if found.id == request_id or (not found.ok and not found.id) else None


def result(found: Reply, kind: Any) -> Any:
    """What a reply says, as ``kind``; a refusal is raised as its own type."""
    if not found.ok:
        raise error(found)
    try:
        return msgspec.convert(found.result, kind)
    except msgspec.ValidationError as trouble:
        raise ProtocolError(
            f"the server's answer is not understood (another version?): {trouble}"
        ) from trouble


def error(found: Reply) -> HarliError:
    body = found.error
    if body is None:
        return HarliError("the server refused the request and gave no reason")
    kind = ERRORS.get(body.code, HarliError)
    return kind(body.message, code=body.code, param=body.param, details=body.details)

"""OpenAI's error object, and which status a refusal has.

The openai client tries 408, 409, 429 and each 5xx twice again.  What another try cannot mend has
none of these statuses, and says ``x-should-retry: false``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from sglang_harli.errors import HarliError, NotFoundError, NotReadyError
from sglang_harli.protocol.public import BUSY

INVALID = "invalid_request_error"
SERVER = "server_error"
TYPES = {429: "rate_limit_error", 500: SERVER, 503: SERVER}  # of each other status: INVALID

# Of codes whose status does not follow from the error's type: status, and seconds for Retry-After.
# A code that is not here and of no type below is a refusal on purpose: 400.
STATUS: dict[str, tuple[int, int | None]] = {
    "not_found": (404, None),
    "too_large": (413, None),
    BUSY: (429, 1),
    "unavailable": (503, 2),
    "not_ready": (503, 5),
    "timeout": (503, 10),
    "finetune_down": (503, 60),
    "idempotency_conflict": (400, None),
    "storage_full": (400, None),  # waiting does not mend it: files have to be deleted
    "internal": (500, None),
}
# A second later it is the same: the operator has to act first.
NO_RETRY = {"finetune_down"}


class Refusal(HarliError):
    """An error with a status and headers of its own; ``code`` is OpenAI's where it has one."""

    code = "bad_request"

    def __init__(
        self, message: str, *, status: int = 400, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.status = status
        self.headers = dict(headers or {})


def status_of(error: HarliError) -> tuple[int, int | None]:
    """The status, and the seconds after which another try may do."""
    if isinstance(error, Refusal):
        return error.status, None
    known = STATUS.get(error.code)
    if known is not None:
        return known
    if isinstance(error, NotFoundError):
        return 404, None
    if isinstance(error, NotReadyError):
        return STATUS["not_ready"]
    return 400, None


def response(error: HarliError) -> Response:
    """The refusal in OpenAI's form."""
    status, after_s = status_of(error)
    headers = dict(error.headers) if isinstance(error, Refusal) else {}
    if after_s is not None:
        headers["Retry-After"] = str(after_s)
    retried = status in (408, 409, 429) or status >= 500
    if not retried or error.code in NO_RETRY:
        headers["x-should-retry"] = "false"
    return Response(_body(error, status), status, headers, "application/json")


def internal(request_id: str) -> Response:
    """The answer to a request that met a defect of ours; the log has the traceback."""
    text = f"the server failed at this request; its log says how, under {request_id}"
    return response(HarliError(text, code="internal"))


def _body(error: HarliError, status: int) -> bytes:
    said: dict[str, Any] = {
        "message": error.message,
        "type": TYPES.get(status, INVALID),
        "param": error.param,
        "code": error.code,
    }
    if error.details:
        said["harli"] = {"details": error.details}
    return orjson.dumps({"error": said})

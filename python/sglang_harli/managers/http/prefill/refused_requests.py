"""HTTP process of either server of a pair: a request that one of them refuses ends on the other.

SGLang's router sends a request to both and waits for both.  Where one refuses what the other takes
(an adapter that has just been deleted, or that only one has), that other waits for its peer, and
the client for five minutes, SGLang's limit.  A request has the same id on both, its
``bootstrap_room``: the decode server sends its own to the prefill servers at once, and reads theirs
with each look at them.

Leans on SGLang: ``bootstrap_room`` of its requests, and its TokenizerManager (rid_to_state, whose
states have ``obj``, and abort_request).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import orjson

KEPT_S = 30.0  # what was refused is looked at once a second
MAX_KEPT = 10_000
MAX_BODY = 16 << 20  # of a request; that of a longer one is not looked at
WAIT_S, POLL_S = 5.0, 0.1  # the router sends to both at once, and one may be slower
ATTRIBUTE = "harli_refused_requests"  # of SGLang's TokenizerManager: takes ids of refused requests


# ------------------------------------------------------------------ which were refused
class RefusedRequests:
    """Ids of the requests that this server refused lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, float] = {}  # the oldest first

    def add(self, ids: Iterable[int]) -> None:
        for one in ids:
            self._since[one] = self._clock()
        while len(self._since) > MAX_KEPT:
            del self._since[next(iter(self._since))]

    def __contains__(self, one: int) -> bool:
        return one in self._since

    def lately(self) -> list[int]:
        begin_s = self._clock() - KEPT_S
        while self._since and self._since[oldest := next(iter(self._since))] < begin_s:
            del self._since[oldest]
        return list(self._since)


def ids_in(body: bytes) -> list[int]:
    """Of a request's JSON (pure); of what is none, none."""
    if b"bootstrap_room" not in body:
        return []
    with contextlib.suppress(ValueError):
        found = orjson.loads(body)
        return ids_of(found.get("bootstrap_room")) if isinstance(found, dict) else []
    return []


def ids_of(value: Any) -> list[int]:
    """Of one request, or of each of several (pure); SGLang's own checks have the id 0."""
    return [room for room in (value if isinstance(value, list) else [value]) if type(room) is int and room]


class RefusalMiddleware:
    """ASGI: calls ``refused`` with the ids of requests that are answered with an error."""

    def __init__(self, app: Any, refused: Callable[[list[int]], None]) -> None:
        self._app, self._refused = app, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def received() -> Any:
            message = await receive()
            if len(body) <= MAX_BODY:
                body.extend(message.get("body", b""))
            return message

        async def sent(message: Any) -> None:
            refuses = message["type"] == "http.response.start" and message["status"] >= 400
            if refuses and (ids := ids_in(bytes(body))):
                self._refused(ids)
            await send(message)

        await self._app(scope, received, sent)


def _is_json(scope: Any) -> bool:
    return any(name == b"content-type" and b"json" in value for name, value in scope["headers"])


@contextlib.contextmanager
def noted(manager: Any, obj: Any) -> Iterator[None]:
    """Around what may refuse a request whose answer has begun already, as a stream's has."""
    try:
        yield
    except Exception:
        refused = getattr(manager, ATTRIBUTE, None)
        if refused is not None and (ids := ids_of(getattr(obj, "bootstrap_room", None))):
            refused(ids)
        raise


# ------------------------------------------------------------------ their other halves
async def end(manager: Any, ids: Iterable[int], wait_s: float = WAIT_S, refused: Container[int] = ()) -> None:
    """Abort the requests of these ids here, those too that come within ``wait_s``; one that is
    ``refused`` here too has ended."""
    left, deadline = set(ids), time.monotonic() + wait_s
    while True:
        for rid, state in list(manager.rid_to_state.items()):
            room = getattr(state.obj, "bootstrap_room", None)
            if type(room) is int and room in left:
                left.discard(room)
                manager.abort_request(rid=rid)
        left = {room for room in left if room not in refused}
        if not left or time.monotonic() > deadline:
            return
        await asyncio.sleep(POLL_S)

"""What all routes under ``/v1/files``, ``/v1/uploads`` and ``/v1/fine_tuning``, and the deletion of
a model, have in common: who may come, and that each answer, also to what is wrong or unknown there,
is in OpenAI's form.

SGLang's own routes, exception handlers and middleware do not see these paths' errors, and none of
ours sees theirs.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from sglang_harli.config import HarliOptions
from sglang_harli.errors import HarliError, NotFoundError
from sglang_harli.managers.http.openai import errors
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.errors import Refusal
from sglang_harli.managers.http.openai.forms.form_stream import FormReader
from sglang_harli.managers.http.service_calls import ServiceCalls
from sglang_harli.protocol import public

logger = logging.getLogger(__name__)

PATHS = ("/v1/files", "/v1/uploads", "/v1/fine_tuning")
MODELS = "/v1/models/"  # below it only DELETE is ours
JSON = "application/json"
REQUEST_ID = "x-request-id"  # the openai client shows it with an error
MAX_ID = 128
# A body that is unpacked before it is counted has no bound.
_COMPRESSED = ("content-encoding", "x-body-compressed")

Handler = Callable[[Request], Awaitable[Response]]


class ServedModels(Protocol):
    """What is served on this server."""

    def is_base(self, name: str) -> bool:
        """Whether the base answers to this name."""
        ...

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter of this name is loaded."""
        ...

    async def unload(self, name: str, *, deleted: bool) -> str:
        """Unload the adapter when its requests have ended, where it is loaded; what is wrong, or
        ``""``.  ``deleted``: it is a job's, and never comes back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Api:
    """What the routes work with; each module of routes adds its own to a router."""

    calls: ServiceCalls
    forms: FormReader
    options: HarliOptions
    models: ServedModels


# ------------------------------------------------------------------ paths
def route_path(scope: Scope) -> str:
    """A request's path without ``--fastapi-root-path``, as Starlette's routes match it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path


def ours(scope: Scope) -> bool:
    """Whether a request is for one of PATHS, for something below it, or deletes a model."""
    if scope["type"] != "http":
        return False
    path = route_path(scope)
    return deletes_model(scope) or any(path == ours or path.startswith(f"{ours}/") for ours in PATHS)


def deletes_model(scope: Scope) -> bool:
    """Whether a request of type http is ``DELETE /v1/models/NAME``."""
    path = route_path(scope)
    return scope["method"] == "DELETE" and path.startswith(MODELS) and path != MODELS


# ------------------------------------------------------------------ around each handler
def guarded(access: Access, handler: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """``handler`` behind the access check, its errors in OpenAI's form."""

    async def handle(request: Request) -> Response:
        name = f"req_{uuid.uuid4().hex}"
        try:
            access.check(request.scope, admin=deletes_model(request.scope))
            refuse_compressed(request.scope)
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=400)  # nobody reads it
        except HarliError as error:
            if errors.status_of(error)[0] == 500:
                logger.error("harli: %s %s (%s): %s", request.method, route_path(request.scope), name, error)
            response = errors.response(error)
        except Exception:  # boundary: a defect fails the one request that met it; the others go on
            logger.exception("harli: %s %r (%s)", request.method, route_path(request.scope), name)
            response = errors.internal(name)
        response.headers[REQUEST_ID] = name
        return response

    return handle


def refuse_compressed(scope: Scope) -> None:
    names = {name.lower() for name, value in scope["headers"] if value.strip().lower() != b"identity"}
    for name in _COMPRESSED:
        if name.encode() in names:
            text = f"a body with {name} is not accepted here: send it as it is (a file in it may be gzip)"
            raise Refusal(text, param=name, code="invalid_content_encoding")


def router(access: Access) -> APIRouter:
    """A router whose routes are all guarded."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            return guarded(access, super().get_route_handler())

        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            """Not other methods of a model's path: they, and their 405, are SGLang's."""
            others = scope["type"] == "http" and route_path(scope).startswith(MODELS)
            return (Match.NONE, {}) if others and not deletes_model(scope) else super().matches(scope)

    return APIRouter(route_class=GuardedRoute)


class Unmatched(BaseRoute):
    """The route behind ours: any method, and any other path under PATHS.

    ``routes``: ours, to say which methods there are; ``closed``: why there are none at all.
    """

    def __init__(self, access: Access, routes: Sequence[BaseRoute], closed: str | None = None) -> None:
        self.path = PATHS[0]
        self._routes = routes
        self._closed = closed
        self._answer = guarded(access, self._refuse)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if ours(scope) else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _refuse(self, request: Request) -> Response:
        if self._closed is not None:
            raise Refusal(self._closed, status=404, code="finetune_off")
        methods: set[str] = set()
        for route in self._routes:
            if isinstance(route, APIRoute) and route.matches(request.scope)[0] != Match.NONE:
                methods |= route.methods or set()
        if methods:
            allowed = ", ".join(sorted(methods))
            text = f"{request.method} is not allowed here; accepted: {allowed}"
            raise Refusal(text, status=405, code="method_not_allowed", headers={"Allow": allowed})
        text = f"there is no {route_path(request.scope)[:200]!r}: see /docs for the routes"
        raise Refusal(text, status=404, code="unknown_url")


# ------------------------------------------------------------------ for handlers
def answer(found: Any) -> Response:
    """A Struct of ``protocol`` as the response."""
    return Response(public.encode(found), media_type=JSON)


@contextmanager
def referred(param: str) -> Iterator[None]:
    """Around a call whose query or body names an object in ``param``: an error says so."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(error.message, param=param) from error


def object_id(request: Request, name: str, what: str) -> str:
    """An id in the path; NotFoundError: nothing can have this one."""
    given: str = request.path_params[name]
    if not (given.isascii() and given.isprintable() and len(given) <= MAX_ID):
        raise NotFoundError(f"no such {what}: its id is not one of this server's", param=name)
    return given

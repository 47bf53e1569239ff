"""Puts the routes of files, fine-tuning and deleted models on SGLang's app, behind a rule of access
of their own.

Leans on SGLang's ``utils.auth.add_api_key_middleware``, which puts one middleware in front of
Starlette's ``user_middleware``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_harli.config import HarliOptions
from sglang_harli.errors import HarliError
from sglang_harli.managers.http.openai import errors, files, models, uploads
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.endpoint import (
    Api,
    ServedModels,
    Unmatched,
    ours,
    refuse_compressed,
    router,
)
from sglang_harli.managers.http.openai.fine_tuning import jobs
from sglang_harli.managers.http.openai.forms.form_stream import FormReader
from sglang_harli.managers.http.service_calls import ServiceCalls

OFF = "files, fine-tuning and the deletion of models are off on this server: start it without --harli-finetune off"
ROUTES = (files.add, uploads.add, jobs.add, models.add)


def routes(
    calls: ServiceCalls, access: Access, options: HarliOptions, served: ServedModels
) -> list[BaseRoute]:
    """All of them, to stand before SGLang's."""
    made = router(access)
    api = Api(calls=calls, forms=FormReader(calls), options=options, models=served)
    for add in ROUTES:
        add(made, api)
    return [*made.routes, Unmatched(access, made.routes)]


def closed_routes(access: Access) -> list[BaseRoute]:
    """With ``--harli-finetune off``: each answers that it is."""
    return [Unmatched(access, (), OFF)]


# ------------------------------------------------------------------ SGLang's middleware for keys
class BesideKeys:
    """SGLang's middleware for keys, for all paths but ours: those have ``Access``, which takes the
    admin key too and refuses in OpenAI's form."""

    def __init__(self, app: ASGIApp, keys: Middleware) -> None:
        self._app = app
        self._keyed = keys.cls(app, *keys.args, **keys.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not ours(scope):
            await self._keyed(scope, receive, send)
            return
        try:
            refuse_compressed(scope)  # SGLang unpacks a body behind this, before a route is asked
        except HarliError as error:
            await errors.response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def add_api_key_middleware(original: Callable[..., None], app: FastAPI, *args: Any, **kwargs: Any) -> None:
    """Around ``sglang.srt.utils.auth.add_api_key_middleware``."""
    before = list(app.user_middleware)
    original(app, *args, **kwargs)
    added = [one for one in app.user_middleware if all(one is not other for other in before)]
    for one in added:
        app.user_middleware[app.user_middleware.index(one)] = Middleware(BesideKeys, keys=one)

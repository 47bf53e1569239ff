"""HTTP process: additions to SGLang's FastAPI app; publisher and watchdog live in its event loop.

Routes of ours stand before SGLang's of the same path and end in SGLang's own functions; they pass
the same ASGI middleware, which wraps the router as a whole.  The routes of ``openai/`` are new
paths, with a rule for keys of their own.  Leans on SGLang's http_server (app, health_generate,
available_models, retrieve_model), ModelCard, sglang_versions' endpoints, and on Starlette's
``router.lifespan_context``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from sglang_harli import run_paths
from sglang_harli.config import HarliOptions
from sglang_harli.core import PROFILE_ROUTE
from sglang_harli.errors import HarliError
from sglang_harli.managers.http.metrics_collector import MetricsCollector
from sglang_harli.managers.http.model_names import missing_model_error
from sglang_harli.managers.http.openai import install as openai_routes
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.prefill import refused_requests, uploads
from sglang_harli.managers.http.prefill.prefill_servers import PrefillServers
from sglang_harli.managers.http.prefill.uploads import UploadedAdapters
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.served_models import TokenizerModels
from sglang_harli.managers.http.service_calls import ServiceCalls
from sglang_harli.managers.http.start_up.parity_request import ParityRequest
from sglang_harli.managers.http.start_up.startup_profile import StartupProfile
from sglang_harli.managers.http.supervision import supervisor
from sglang_harli.managers.http.tokenizer_handover import TokenizerHandover, hand_over
from sglang_harli.managers.http.training_guards import end_training
from sglang_harli.managers.http.watchdog import Watchdog
from sglang_harli.sglang_versions.current import arguments, endpoints

logger = logging.getLogger(__name__)


def install(
    app: FastAPI, server_args: Any, tokenizer_manager: Any, handover: TokenizerHandover | None = None
) -> None:
    """Add the health gate, the model routes for adapters and those of files and fine-tuning, and
    tie the publisher to the lifespan.  With finetuning off the latter say so, and that is all.

    Called once, before the app serves; ``app`` is sglang.srt.entrypoints.http_server.app, and
    ``tokenizer_manager`` gets the attribute ``harli_publisher``.
    """
    options: HarliOptions = server_args.harli_options()
    args = arguments.in_force(server_args)
    access = Access(args.api_key, args.admin_api_key)
    if not options.enabled:
        app.router.routes[:0] = openai_routes.closed_routes(access)
        if args.disaggregation_mode == "prefill":
            store = UploadedAdapters(tokenizer_manager, options.file_bytes)
            _note_refusals(app, tokenizer_manager, store.refused.add)
            _take_adapters(app, store, access)
        return
    pair = None
    if args.disaggregation_mode == "decode":
        end = functools.partial(refused_requests.end, tokenizer_manager, wait_s=0.0)
        pair = PrefillServers(options.prefill_url or (), args.admin_api_key or args.api_key, end)
        _note_refusals(app, tokenizer_manager, pair.refused)
    publisher = AdapterPublisher(
        tokenizer_manager, run_paths.http_endpoint(options.absolute_run_dir), handover, pair
    )
    tokenizer_manager.harli_publisher = publisher
    calls = ServiceCalls(run_paths.verbs_endpoint(options.absolute_run_dir), lambda: publisher.down)
    metrics = MetricsCollector() if args.enable_metrics else None
    profile = StartupProfile(publisher, tokenizer_manager, options.profile_budget_s)
    watchdog = Watchdog(options, supervisor.running, publisher, metrics)
    compared = options.parity != "off" and (pair is None or pair.servers)
    parity = ParityRequest(publisher, tokenizer_manager, profile) if compared else None
    tokenizer_manager.harli_parity = parity
    _follow_lifespan(app, tokenizer_manager, publisher, calls, watchdog, profile, parity)
    app.router.routes[:0] = [
        *routes(publisher, tokenizer_manager, profile).routes,
        *openai_routes.routes(calls, access, options, TokenizerModels(tokenizer_manager, publisher)),
    ]


def before_setup_and_run(
    server_args: Any, tokenizer_manager: Any, template_manager: Any, *args: Any, **kwargs: Any
) -> None:
    """Hook before ``http_server._setup_and_run_http_server``: no event loop runs yet."""
    from sglang.srt.entrypoints import http_server

    options: HarliOptions = server_args.harli_options()
    handover = None
    if options.enabled:
        handover = hand_over(tokenizer_manager, template_manager, options.absolute_run_dir)
    install(http_server.app, server_args, tokenizer_manager, handover)


def _note_refusals(app: FastAPI, manager: Any, refused: Callable[[list[int]], None]) -> None:
    """On either server of a pair: what one refuses ends on the other."""
    setattr(manager, refused_requests.ATTRIBUTE, refused)
    app.add_middleware(refused_requests.RefusalMiddleware, refused=refused)


def _take_adapters(app: FastAPI, store: UploadedAdapters, access: Access) -> None:
    """On a prefill server: adapters come from its decode servers."""
    original = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(inner: Any) -> AsyncIterator[Any]:
        async with original(inner) as state:
            try:
                yield state
            finally:
                store.close()

    app.router.lifespan_context = lifespan
    app.router.routes[:0] = uploads.routes(store, access).routes


def _follow_lifespan(
    app: FastAPI,
    manager: Any,
    publisher: AdapterPublisher,
    calls: ServiceCalls,
    watchdog: Watchdog,
    profile: StartupProfile,
    parity: ParityRequest | None,
) -> None:
    original = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(inner: Any) -> AsyncIterator[Any]:
        async with original(inner) as state:
            publisher.start()
            if publisher.pair is not None:
                publisher.pair.start()
            calls.start()
            watchdog.start()
            profile.start()
            if parity is not None:
                parity.start()
            try:
                yield state
            finally:
                if parity is not None:
                    await parity.stop()
                await end_training(manager)
                await profile.stop()
                await watchdog.stop()
                await calls.stop()
                await publisher.stop()
                if publisher.pair is not None:
                    await publisher.pair.stop()

    app.router.lifespan_context = lifespan


def gated(publisher: AdapterPublisher, startup: StartupProfile) -> Response | None:
    """503 until the finetune service and the scheduler have met once (and, with
    --harli-profile-budget-s, the profile is measured).

    The gate never closes again: trouble in finetuning is none of serving.  A service that is
    given up before they have met opens it.
    """
    if not publisher.was_ready and publisher.down is None:
        return PlainTextResponse(not_ready_reason(publisher), status_code=503)
    if not startup.done:
        return PlainTextResponse("sglang-harli: measuring a latency profile\n", status_code=503)
    return None


def routes(publisher: AdapterPublisher, tokenizer_manager: Any, startup: StartupProfile) -> APIRouter:
    """The routes that stand before SGLang's."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.openai.protocol import ModelCard

    router = APIRouter()

    def gate() -> Response | None:
        return gated(publisher, startup)

    @router.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """SGLang's answer behind the gate."""
        return gate() or await http_server.health_generate(request)

    if (sglang_ready := endpoints.ready()) is not None:

        @router.get("/ready")
        async def ready() -> Response:
            """SGLang's answer behind the gate."""
            return gate() or await sglang_ready()

    @router.get(PROFILE_ROUTE)
    async def profile() -> Response:
        """What ``harli profile`` asks for: the scheduler builds it only then."""
        try:
            return JSONResponse(await publisher.ask("harli/profile", {}))
        except HarliError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)

    def card(name: str, path: str | None) -> ModelCard:
        return ModelCard(id=name, root=path, parent=tokenizer_manager.served_model_name)

    @router.get("/v1/models")
    async def available_models() -> Any:
        """SGLang's list (the base and the loaded adapters) and the adapters that load on demand."""
        models = await http_server.available_models()
        models.data = [model for model in models.data if model.id not in publisher.others]
        for name in publisher.dormant():
            models.data.append(card(name, tokenizer_manager.lora_ref_cache[name].lora_path))
        return models

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Any:
        """An adapter, or SGLang's answer (which knows the base alone)."""
        if model in publisher.others:
            return missing_model_error(tokenizer_manager, model)
        ref = tokenizer_manager.lora_registry.get_all_adapters().get(model)
        if ref is not None:
            return card(model, ref.lora_path)
        if model in publisher.dormant():
            return card(model, tokenizer_manager.lora_ref_cache[model].lora_path)
        return await http_server.retrieve_model(model)

    return router


def not_ready_reason(publisher: AdapterPublisher) -> str:
    """Why the server is not healthy yet, in one line."""
    keeper = supervisor.running()
    if keeper is not None and keeper.gave_up is not None:
        return f"sglang-harli: {keeper.gave_up}\n"
    if publisher.state is None:
        return "sglang-harli: waiting for the finetune service\n"
    if not publisher.state.endpoint_bound:
        return "sglang-harli: the finetune service has not opened its endpoint yet\n"
    return "sglang-harli: the finetune service waits for the scheduler's hello\n"

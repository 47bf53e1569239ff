"""Model names, the health gate and the model routes on SGLang's own app and handlers.

Only SGLang's TokenizerManager is stood in for: it answers with the adapter it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import pkgutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from fastapi import FastAPI, HTTPException, Response
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.protocol import MessageProcessingResult
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn
from sglang.srt.utils.auth import add_api_key_middleware

from sglang_harli import FinetuneClient, plugin
from sglang_harli.config import HarliOptions
from sglang_harli.errors import HarliError
from sglang_harli.managers.http import routes
from sglang_harli.managers.http.model_names import MissingModelError
from sglang_harli.managers.http.openai.endpoint import Unmatched
from sglang_harli.managers.http.publisher import TENSOR_PATH
from sglang_harli.managers.http.start_up.startup_profile import StartupProfile
from sglang_harli.managers.http.supervision import supervisor
from sglang_harli.managers.http.supervision.supervisor import RestartPolicy, Supervisor
from support.model_runner import NEWEST
from support.plain_arguments import plain_arguments, read_arguments

LOADED, EVICTED, MISSING = "base-ft-a-00000001", "base-ft-b-00000002", "base-ft-c-00000003"
FOREIGN = "pirate"
# Of SGLang's arguments.
PLAIN = {"enable_metrics": False, "api_key": None, "admin_api_key": None, "disaggregation_mode": "null"}


@pytest.fixture
def manager() -> Any:
    """Stands in for SGLang's TokenizerManager; ``asked`` collects the requests that would be
    served."""
    made = MagicMock()
    made.served_model_name = "base"
    made.model_path = "/models/base-ft-of-another-time"
    made.server_args = plain_arguments(enable_lora=True)
    read_arguments(made)
    refs = [LoRARef(lora_name=LOADED, lora_path=TENSOR_PATH), LoRARef(lora_name=FOREIGN, lora_path="/p")]
    made.lora_registry = LoRARegistry(refs)
    evicted = LoRARef(lora_name=EVICTED, lora_path=TENSOR_PATH)
    made.lora_ref_cache = {ref.lora_name: ref for ref in [*refs, evicted]}
    made.model_config.get_default_sampling_params.return_value = {}
    made.model_config.is_multimodal = False
    made.model_config.context_len = 128
    made.request_logger.log_requests = False
    made.create_abort_task.return_value = None
    made.dumper_control = AsyncMock(return_value=[])
    made.gracefully_exit = False
    made.asked = []

    async def generate(obj: Any, request: Any = None) -> AsyncIterator[dict[str, Any]]:
        made.asked.append(obj.lora_path)
        meta = {
            "id": "r",
            "weight_version": "1",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "finish_reason": {"type": "stop"},
        }
        yield {"text": f"from {obj.lora_path}", "meta_info": meta, "index": 0, "output_ids": [1]}

    made.generate_request = generate
    return made


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of plugin's table for model names, put in place as SGLang's registry does."""
    for row in plugin.TABLE:
        module, name = row.hook.split(":")
        if module.endswith(".model_names"):
            owner, attribute = row.target.rsplit(".", 1)
            target = pkgutil.resolve_name(owner)
            hook = getattr(importlib.import_module(module), name)
            wrapped = _wrap_fn(getattr(target, attribute), hook, HookType(row.kind))
            monkeypatch.setattr(target, attribute, wrapped)


@pytest.fixture
def app(hooks: None, manager: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FastAPI:
    """SGLang's app with our additions and its OpenAI handlers."""
    app = http_server.app
    saved = list(app.router.routes)
    monkeypatch.setattr(app.router, "lifespan_context", app.router.lifespan_context)
    monkeypatch.setattr(app, "middleware_stack", None)
    monkeypatch.setattr(app, "user_middleware", list(app.user_middleware))
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    options = HarliOptions(run_dir=str(tmp_path))
    routes.install(app, SimpleNamespace(harli_options=lambda: options, **PLAIN), manager)
    templates = MagicMock(completion_template_name=None, chat_template_name=None)
    completion, chat = OpenAIServingCompletion(manager, templates), OpenAIServingChat(manager, templates)
    messages = MessageProcessingResult(
        prompt="x", prompt_ids=[1], image_data=None, audio_data=None, video_data=None, modalities=[], stop=[]
    )
    monkeypatch.setattr(chat, "_process_messages", lambda *_: messages)
    responses = OpenAIServingResponses.__new__(OpenAIServingResponses)
    responses.tokenizer_manager = manager
    monkeypatch.setattr(app.state, "openai_serving_completion", completion, raising=False)
    monkeypatch.setattr(app.state, "openai_serving_chat", chat, raising=False)
    monkeypatch.setattr(app.state, "anthropic_serving", AnthropicServing(chat), raising=False)
    monkeypatch.setattr(app.state, "openai_serving_responses", responses, raising=False)
    yield app
    app.router.routes[:] = saved
    app.middleware_stack = None


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)  # without its lifespan, which would start SGLang's warm-up


BODIES = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x"},
}
OPENAI = ("/v1/completions", "/v1/chat/completions")


def ask(client: TestClient, path: str, model: str, **values: Any) -> Any:
    return client.post(path, json={**BODIES[path], "model": model, **values})


# ------------------------------------------------------------------ names
@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (LOADED, LOADED),
        (EVICTED, EVICTED),
        (f"base:{LOADED}", LOADED),
        (FOREIGN, FOREIGN),
        (f"base:{FOREIGN}", FOREIGN),
        ("base:unknown", "unknown"),  # SGLang answers 400 when it looks it up
        ("base", None),
        ("default", None),
        ("gpt-4o", None),
        ("/models/base-ft-of-another-time", None),
    ],
)
def test_model_names_the_adapter_or_the_base(
    client: TestClient, manager: Any, path: str, model: str, adapter: Any
):
    assert ask(client, path, model).status_code == 200
    assert manager.asked == [adapter]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize("model", [MISSING, f"base:{MISSING}", f"{LOADED}x", f"{MISSING}:"])
def test_missing_adapter_is_a_404_in_openais_form(
    client: TestClient, manager: Any, path: str, model: str, stream: bool
) -> None:
    answer = ask(client, path, model, stream=stream)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "model_not_found",
        "invalid_request_error",
        "model",
    )
    assert model.removeprefix("base:") in error["message"]
    assert manager.asked == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [*OPENAI, "/v1/messages"])
def test_a_checkpoint_that_is_found_missing_later_is_a_404_too(
    client: TestClient, manager: Any, path: str, stream: bool
) -> None:
    async def generate(obj: Any, request: Any = None) -> AsyncIterator[dict[str, Any]]:
        assert obj.lora_path == f"{MISSING}-step-2"
        raise MissingModelError(obj.lora_path, "it is not kept any more")
        yield {}

    manager.generate_request = generate
    answer = ask(client, path, f"{MISSING}-step-2", stream=stream)
    if path == "/v1/messages" and stream:
        assert "it is not kept any more" in answer.text
        return
    assert answer.status_code == 404
    text = f"The model '{MISSING}-step-2' does not exist: it is not kept any more"
    assert answer.json()["error"]["message"] == text


@pytest.mark.parametrize("path", OPENAI)
def test_a_served_name_may_hold_a_colon(client: TestClient, manager: Any, path: str) -> None:
    manager.served_model_name = "s3://bucket/base"
    assert ask(client, path, "s3://bucket/base").status_code == 200
    assert ask(client, path, f"s3://bucket/base:{FOREIGN}").status_code == 200
    assert ask(client, path, f"s3://bucket/base:{MISSING}").status_code == 404
    assert manager.asked == [None, FOREIGN]


@pytest.mark.skipif(not NEWEST, reason="0.5.16 has no such routes")
@pytest.mark.parametrize("joint", [False, True])
def test_decisions_never_answer_as_the_base_for_an_adapter(
    app: FastAPI, manager: Any, monkeypatch: pytest.MonkeyPatch, joint: bool
) -> None:
    from sglang.srt.entrypoints.openai import serving_decisions
    from sglang.srt.entrypoints.systemone.serving import SystemOneServing

    features = SimpleNamespace(features=SimpleNamespace(enable_mis=False), dllm=SimpleNamespace())
    features.dllm.dllm_algorithm = None
    monkeypatch.setattr(serving_decisions, "get_exec", lambda: features)
    serving = SystemOneServing.__new__(SystemOneServing)
    serving.tokenizer_manager, serving.template_manager = manager, SimpleNamespace(chat_template_name=None)
    serving.chat_encoding_spec, serving.prompt_text_is_lossy = None, False

    def wrong(model: str) -> Any:
        request = SimpleNamespace(model=model, images=[], chat_template_kwargs={})
        return (
            serving._validate_joint_schema_request(request)  # type: ignore[arg-type]
            if joint
            else serving._validate_server(model)
        )

    assert wrong("base") is None and wrong("default") is None
    for name in (LOADED, EVICTED, FOREIGN, f"base:{FOREIGN}"):
        assert f"the LoRA adapter {name.removeprefix('base:')!r}" in str(wrong(name))
    with pytest.raises(HTTPException) as missing:
        wrong(MISSING)
    assert missing.value.status_code == 404


def test_explicit_lora_path_still_counts_for_the_base(client: TestClient, manager: Any) -> None:
    ask(client, "/v1/completions", "base", lora_path=FOREIGN)
    ask(client, "/v1/completions", LOADED, lora_path=FOREIGN)
    assert manager.asked == [FOREIGN, LOADED]


def test_other_errors_keep_sglangs_form(client: TestClient) -> None:
    answer = ask(client, "/v1/completions", "base", prompt="")
    assert answer.status_code == 400
    assert answer.json()["object"] == "error"


def test_anthropic_messages(client: TestClient, manager: Any) -> None:
    answer = ask(client, "/v1/messages", MISSING)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    ask(client, "/v1/messages", LOADED)
    assert manager.asked == [LOADED]


def test_responses_never_answer_as_the_base_for_an_adapter(client: TestClient) -> None:
    assert ask(client, "/v1/responses", MISSING).status_code == 404
    answer = ask(client, "/v1/responses", LOADED)
    assert answer.status_code == 400
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


# ------------------------------------------------------------------ model routes
def test_models_lists_the_base_and_every_adapter_that_answers(client: TestClient) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert set(cards) == {"base", LOADED, EVICTED, FOREIGN}
    assert {cards[name]["parent"] for name in (LOADED, EVICTED, FOREIGN)} == {"base"}
    assert cards["base"]["max_model_len"] == 128


@pytest.mark.parametrize("name", ["base", LOADED, EVICTED, FOREIGN])
def test_model_is_found_by_id(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/models/{name}")
    assert (answer.status_code, answer.json()["id"], answer.json()["object"]) == (200, name, "model")


def test_missing_model_is_a_404_by_id(client: TestClient) -> None:
    answer = client.get(f"/v1/models/{MISSING}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


# ------------------------------------------------------------------ health
@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: Any) -> Response:
        return Response(status_code=200)

    monkeypatch.setattr(http_server, "health_generate", answer)


def test_health_waits_for_the_service_and_is_sglangs_own_afterwards(
    client: TestClient, manager: Any, healthy: None
) -> None:
    answer = client.get("/health_generate")
    assert answer.status_code == 503
    assert "waiting for the finetune service" in answer.text
    manager.harli_publisher.was_ready = True
    assert client.get("/health_generate").status_code == 200


def test_health_says_so_when_the_service_never_came_up(
    client: TestClient, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Supervisor("harli_no_such_module", {}, policy=RestartPolicy(limit=1))
    keeper.start()
    while keeper.gave_up is None:
        asyncio.run(asyncio.sleep(0.05))
    monkeypatch.setattr(supervisor, "running", lambda: keeper)
    answer = client.get("/health_generate")
    assert answer.status_code == 503
    assert "ended 1 times in a row" in answer.text


def test_health_is_sglangs_own_once_the_service_is_given_up(
    client: TestClient, manager: Any, healthy: None
) -> None:
    assert client.get("/health_generate").status_code == 503
    manager.harli_publisher.go_down("the finetune service ended 8 times in a row")
    assert client.get("/health_generate").status_code == 200


@pytest.mark.skipif(not NEWEST, reason="SGLang 0.5.16 has no /ready")
def test_ready_waits_as_health_does_and_is_sglangs_own_afterwards(client: TestClient, manager: Any) -> None:
    manager.is_pause, manager.server_status = False, ServerStatus.Up
    manager.is_ready = functools.partial(TokenizerManager.is_ready, manager)
    manager.is_healthy = functools.partial(TokenizerManager.is_healthy, manager)
    answer = client.get("/ready")
    assert answer.status_code == 503 and "waiting for the finetune service" in answer.text
    manager.harli_publisher.was_ready = True
    assert client.get("/ready").status_code == 200
    for name, value in (("is_pause", True), ("gracefully_exit", True)):
        before = getattr(manager, name)
        setattr(manager, name, value)
        assert client.get("/ready").status_code == 503
        setattr(manager, name, before)
    manager.harli_publisher.was_ready = False
    assert client.get("/ready").status_code == 503
    manager.harli_publisher.go_down("the finetune service ended 8 times in a row")
    assert client.get("/ready").status_code == 200


@pytest.mark.skipif(NEWEST, reason="SGLang 0.5.23 has /ready")
def test_where_sglang_has_no_ready_neither_have_we(client: TestClient) -> None:
    assert client.get("/ready").status_code == 404


def test_health_waits_for_a_profile_that_the_start_measures(
    app: FastAPI, manager: Any, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    startup = StartupProfile(manager.harli_publisher, manager, 20.0)
    app.router.routes[:0] = routes.routes(manager.harli_publisher, manager, startup).routes
    manager.harli_publisher.was_ready = True
    client = TestClient(app)
    answer = client.get("/health_generate")
    assert answer.status_code == 503 and "measuring a latency profile" in answer.text
    startup.done = True
    assert client.get("/health_generate").status_code == 200


# ------------------------------------------------------------------ the profile
def test_the_profile_is_asked_of_the_scheduler_only_when_it_is_wanted(
    client: TestClient, manager: Any
) -> None:
    asked = []

    async def control(request: Any) -> list[Any]:
        asked.append(request.method)
        good = len(asked) == 1
        return [SimpleNamespace(success=good, response=[{"path": "p"}] if good else [], error="no trainer")]

    manager.dumper_control = control
    client.get("/v1/models")
    assert asked == []
    assert client.get("/harli/profile").json() == {"path": "p"}
    refused = client.get("/harli/profile")
    assert refused.status_code == 503 and "no trainer" in refused.text
    assert asked == ["harli/profile"] * 2


def test_a_service_that_never_came_up_does_not_keep_the_server_from_serving(
    tmp_path: Path, manager: Any, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Supervisor("harli_no_such_module", {})
    keeper.give_up("there is no folder for the sockets")
    monkeypatch.setattr(supervisor, "running", lambda: keeper)
    app = FastAPI()
    options = HarliOptions(run_dir=str(tmp_path), finetune_endpoint=f"ipc://{tmp_path}/public.sock")
    routes.install(app, SimpleNamespace(harli_options=lambda: options, **PLAIN), manager)
    with TestClient(app) as client:
        end = time.monotonic() + 30
        while client.get("/health_generate").status_code != 200:
            assert time.monotonic() < end
        with FinetuneClient(options.finetune_endpoint) as finetune:
            told = finetune.status().service
            assert (told["state"], told["reason"]) == ("down", "there is no folder for the sockets")
            with pytest.raises(HarliError, match="there is no folder for the sockets") as caught:
                finetune.list()
            assert caught.value.code == "finetune_down"


# ------------------------------------------------------------------ the app
def test_api_key_guards_our_routes(app: FastAPI) -> None:
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app)
    ours = {route.path for route in routes.routes(MagicMock(), MagicMock(), MagicMock()).routes}  # type: ignore[attr-defined]
    ready = {"/ready"} if NEWEST else set()  # open to all, as /health_generate is
    assert ours == {"/health_generate", "/harli/profile", "/v1/models", "/v1/models/{model:path}"} | ready
    assert client.get("/harli/profile").status_code == 401
    for path in ("/v1/models", f"/v1/models/{LOADED}", "/v1/models/base"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert client.get(path, headers=headers).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_what_sglang_leaves_open_stays_open(
    app: FastAPI, manager: Any, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_api_key_middleware(app, api_key="secret", admin_api_key="admin")
    client = TestClient(app)
    open_to_all = ["/health_generate", *(["/ready"] if NEWEST else [])]
    assert [client.get(path).status_code for path in open_to_all] == [503] * len(open_to_all)
    manager.harli_publisher.was_ready = True
    assert [client.get(path).status_code for path in open_to_all] == [200] * len(open_to_all)
    for path in ("/v1/models", f"/v1/models/{LOADED}"):  # the other key does not open them, as with SGLang's
        assert client.get(path, headers={"Authorization": "Bearer admin"}).status_code == 401


def test_publisher_lives_as_long_as_the_app_serves(tmp_path: Path, manager: Any) -> None:
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        seen.append("up")
        yield
        seen.append("down")

    app = FastAPI(lifespan=lifespan)
    options = HarliOptions(run_dir=str(tmp_path))
    routes.install(app, SimpleNamespace(harli_options=lambda: options, **PLAIN), manager)
    with TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost") as client:
        assert manager.harli_publisher._task is not None
        away = client.get("/v1/files")  # no service is there
        assert (away.status_code, away.headers["retry-after"]) == (503, "2")
    assert manager.harli_publisher._task is None
    assert seen == ["up", "down"]


def test_with_finetuning_off_only_the_paths_of_files_and_jobs_say_so(manager: Any) -> None:
    app = FastAPI()
    before = len(app.router.routes)
    options = HarliOptions(finetune="off")
    routes.install(app, SimpleNamespace(harli_options=lambda: options, **PLAIN), manager)
    assert [type(route) for route in app.router.routes[:-before]] == [Unmatched]
    client = TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost")
    for path in ("/v1/files", "/v1/files/a", "/v1/uploads", "/v1/fine_tuning/jobs"):
        answer = client.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "finetune_off")
        assert "--harli-finetune off" in answer.json()["error"]["message"]
    answer = client.delete("/v1/models/org/some")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "finetune_off")
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/some"), ("DELETE", "/v1/models")):
        assert client.request(method, path).json() == {"detail": "Not Found"}

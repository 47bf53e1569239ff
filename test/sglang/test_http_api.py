"""The routes of files and fine-tuning on SGLang's own app: they are there, SGLang's middleware for
keys leaves them to their own rule, and SGLang's own routes answer byte for byte as without them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn
from sglang.srt.utils import auth

from sglang_harli import plugin
from sglang_harli.config import HarliOptions
from sglang_harli.managers.http import routes
from support.plain_arguments import plain_arguments

ROW = next(row for row in plugin.TABLE if row.target.endswith(".add_api_key_middleware"))
SERVICE_AWAY = (503, "unavailable")  # access was given: the request came as far as the service's socket
PATHS = ("/v1/files", "/v1/files/file-1", "/v1/files/file-1/content")


@contextlib.contextmanager
def served(key: str | None, admin: str | None, change: Callable[[FastAPI], None]) -> Iterator[FastAPI]:
    """SGLang's app as ``_setup_and_run_http_server`` leaves it; ``change`` comes before, as our
    hook does."""
    app = http_server.app
    saved = list(app.router.routes), list(app.user_middleware), app.router.lifespan_context
    app.middleware_stack = app.openapi_schema = None
    try:
        change(app)
        if key or admin or auth.app_has_admin_force_endpoints(app):
            auth.add_api_key_middleware(app, api_key=key, admin_api_key=admin)
        yield app
    finally:
        app.router.routes[:], app.user_middleware[:], app.router.lifespan_context = saved
        app.middleware_stack = app.openapi_schema = None


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the plugin's table, put in place as SGLang's registry does."""
    module, name = ROW.hook.split(":")
    hook = getattr(importlib.import_module(module), name)
    wrapped = _wrap_fn(auth.add_api_key_middleware, hook, HookType(ROW.kind))
    monkeypatch.setattr(auth, "add_api_key_middleware", wrapped)
    plain_arguments()


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Callable[[FastAPI], None]]:
    def made(
        key: str | None = None, admin: str | None = None, finetune: str = "on"
    ) -> Callable[[FastAPI], None]:
        options = HarliOptions(run_dir=str(tmp_path), finetune=finetune)
        args = SimpleNamespace(
            harli_options=lambda: options,
            enable_metrics=False,
            api_key=key,
            admin_api_key=admin,
            disaggregation_mode="null",
        )
        manager = MagicMock()
        manager.lora_ref_cache = {}
        return lambda app: routes.install(app, args, manager)

    return made


def local(app: FastAPI, peer: str = "127.0.0.1") -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:30000", client=(peer, 5), raise_server_exceptions=False)


def outcome(answer: Any) -> tuple[int, str]:
    assert set(answer.json()) == {"error"}, answer.text
    return answer.status_code, answer.json()["error"]["code"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("key", "admin", "accepted"), [("k", None, "k"), (None, "a", "a"), ("k", "a", "ka"), (None, None, "")]
)
def test_keys_open_and_close_our_routes(
    install: Any, key: str | None, admin: str | None, accepted: str
) -> None:
    with served(key, admin, install(key, admin)) as app:
        client, far = local(app), local(app, "10.0.0.7")
        for path in PATHS:
            for given in "ka":
                expected = SERVICE_AWAY if given in accepted or not accepted else (401, "invalid_api_key")
                assert outcome(client.get(path, headers=bearer(given))) == expected
                if accepted:
                    assert outcome(far.get(path, headers=bearer(given))) == expected
            assert outcome(client.get(path)) == ((401, "invalid_api_key") if accepted else SERVICE_AWAY)
            assert outcome(far.get(path)) == ((401, "invalid_api_key") if accepted else (403, "key_required"))
        foreign = client.get("/v1/files", headers={"Origin": "https://evil.example"})
        assert outcome(foreign)[0] == (401 if accepted else 403)
        preflight = {"Origin": "https://ui.example", "Access-Control-Request-Method": "GET"}
        assert client.options("/v1/files", headers=preflight).status_code == 200  # CORS is SGLang's
        odd = client.post("/v1/files", headers={"x-body-compressed": "zstd", **bearer("k"), **bearer("a")})
        assert outcome(odd) == (400, "invalid_content_encoding")
        for path in ("/v1/files%0A", "/v1/fine_tuning/%0A", "/v1/uploads/x/y"):
            assert far.get(path).status_code in (401, 403), path


@pytest.mark.parametrize(
    ("key", "admin", "accepted"), [("k", None, "k"), (None, "a", "a"), ("k", "a", "a"), (None, None, "")]
)
def test_a_model_is_deleted_by_who_may_unload_an_adapter(
    install: Any, key: str | None, admin: str | None, accepted: str
) -> None:
    with served(key, admin, install(key, admin)) as app:
        client, far = local(app), local(app, "10.0.0.7")
        for given in "ka":
            expected = SERVICE_AWAY if given in accepted or not accepted else (401, "invalid_api_key")
            for path in ("/v1/models/some", "/v1/models/org/some", "/v1/models/org%2Fsome"):
                assert outcome(client.delete(path, headers=bearer(given))) == expected
            may = client.post("/unload_lora_adapter", json={}, headers=bearer(given)).status_code != 401
            assert may == (expected == SERVICE_AWAY), "as SGLang has it"
        assert outcome(far.delete("/v1/models/some"))[0] == (401 if accepted else 403)
        assert client.delete("/v1/models/some", headers={"Origin": "https://evil.example"}).status_code == (
            401 if accepted else 403
        )


PROBES: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/nothing", {}),
    ("GET", "/v1/filesystem", {}),
    ("POST", "/v1/models", {}),
    ("DELETE", "/v1/models", {}),
    ("DELETE", "/v1/models/", {}),
    *((method, "/v1/models/org/none", {}) for method in ("POST", "PUT", "PATCH", "HEAD", "OPTIONS")),
    ("POST", "/v1/completions", {"content": b"{", "headers": {"content-type": "application/json"}}),
    ("POST", "/v1/completions", {"content": b"x", "headers": {"content-type": "text/plain"}}),
    ("POST", "/v1/chat/completions", {"json": {"model": 3}}),
    ("POST", "/v1/responses", {"json": {}}),
    ("POST", "/v1/messages", {"json": {}}),
    ("GET", "/generate", {"headers": bearer("wrong")}),
    ("POST", "/generate", {"json": {}, "headers": bearer("k")}),
    ("POST", "/update_weights_from_disk", {"json": {}, "headers": bearer("a")}),
    (
        "OPTIONS",
        "/v1/completions",
        {"headers": {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}},
    ),
    ("PUT", "/v1/completions", {}),
]


def answers(app: FastAPI) -> list[tuple[int, dict[str, str], bytes]]:
    client = local(app)
    found = []
    for method, path, request in PROBES:
        answer = client.request(method, path, **request)
        headers = {name: value for name, value in answer.headers.items() if name != "date"}
        found.append((answer.status_code, headers, answer.content))
    return found


@pytest.mark.parametrize(("key", "admin"), [(None, None), ("k", None), (None, "a"), ("k", "a")])
@pytest.mark.parametrize("finetune", ["on", "off"])
def test_sglangs_own_routes_answer_as_without_ours(
    install: Any, key: str | None, admin: str | None, finetune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(key, admin, install(key, admin, finetune)) as app:
        with_ours = answers(app)
    monkeypatch.undo()  # the middleware for keys is SGLang's again
    plain_arguments()
    with served(key, admin, lambda _app: None) as app:
        assert answers(app) == with_ours
    assert {status for status, _, _ in with_ours} >= {401 if key else 400}


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # SGLang's, and those that ours stand before
def test_routes_are_documented_and_sglangs_are_as_before(install: Any) -> None:
    with served(None, None, lambda _app: None) as app:
        plain = app.openapi()["paths"]
    with served(None, None, install()) as app:
        found = app.openapi()["paths"]
    ours = {
        path: sorted(methods)
        for path, methods in found.items()
        if path.startswith(("/v1/files", "/v1/uploads"))
    }
    assert ours == {
        "/v1/files": ["get", "post"],
        "/v1/files/{file_id}": ["delete", "get"],
        "/v1/files/{file_id}/content": ["get"],
        "/v1/uploads": ["post"],
        "/v1/uploads/{upload_id}/parts": ["post"],
        "/v1/uploads/{upload_id}/complete": ["post"],
        "/v1/uploads/{upload_id}/cancel": ["post"],
    }
    changed = {path for path in plain if plain[path] != found[path]}
    assert changed <= {"/v1/models", "/v1/models/{model}", "/health_generate", "/ready"}
    for path, methods in ours.items():
        for method in methods:
            said = found[path][method]
            assert set(said["responses"]) >= {"200", "400", "401", "403", "429", "500", "503"}
            assert "422" not in said["responses"] and "$ref" not in str(said)

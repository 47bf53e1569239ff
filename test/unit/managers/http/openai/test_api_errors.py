"""Under our paths every answer is in OpenAI's form, and says whether another try can mend it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from sglang_harli.errors import (
    ConfigError,
    DataError,
    HarliError,
    NotFoundError,
    NotReadyError,
    StateError,
    UnsupportedError,
)
from sglang_harli.managers.http.openai import body, errors
from sglang_harli.managers.http.openai.errors import Refusal
from support.api_server import ApiServer
from support.service.verbs_peer import VerbsPeer


# ------------------------------------------------------------------ the table
@pytest.mark.parametrize(
    ("error", "status", "retry_after", "kind"),
    [
        (ConfigError("m", param="p"), 400, None, "invalid_request_error"),
        (DataError("m"), 400, None, "invalid_request_error"),
        (StateError("m"), 400, None, "invalid_request_error"),
        (UnsupportedError("m", code="no_room"), 400, None, "invalid_request_error"),
        (HarliError("m", code="a_code_of_later"), 400, None, "invalid_request_error"),
        (ConfigError("m", code="idempotency_conflict"), 400, None, "invalid_request_error"),
        (HarliError("m", code="storage_full"), 400, None, "invalid_request_error"),
        (NotFoundError("m"), 404, None, "invalid_request_error"),
        (NotFoundError("m", code="job_unknown"), 404, None, "invalid_request_error"),
        (HarliError("m", code="too_large"), 413, None, "invalid_request_error"),
        (NotReadyError("m", code="busy"), 429, 1, "rate_limit_error"),
        (NotReadyError("m", code="unavailable"), 503, 2, "server_error"),
        (NotReadyError("m"), 503, 5, "server_error"),
        (NotReadyError("m", code="finetune_down"), 503, 60, "server_error"),
        (HarliError("m", code="internal"), 500, None, "server_error"),
        (Refusal("m", status=405, headers={"Allow": "GET"}), 405, None, "invalid_request_error"),
    ],
)
def test_each_error_has_its_status(error: HarliError, status: int, retry_after: Any, kind: str) -> None:
    found = errors.response(error)
    assert found.status_code == status
    said = orjson.loads(found.body)
    assert said == {"error": {"message": "m", "type": kind, "param": error.param, "code": error.code}}
    assert found.headers.get("retry-after") == (str(retry_after) if retry_after else None)
    mends = status in (429, 500, 503) and error.code != "finetune_down"
    assert found.headers.get("x-should-retry") == (None if mends else "false")
    assert (status in (408, 409, 429) or status >= 500) or found.headers["x-should-retry"] == "false"


def test_more_rows_of_a_report_are_ours() -> None:
    rows = [{"line": 3, "reason": "not JSON"}]
    said = orjson.loads(errors.response(DataError("m", details=rows)).body)
    assert said["error"]["harli"] == {"details": rows}


# ------------------------------------------------------------------ over HTTP
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Behind it a service that answers nothing but uploads that are cancelled, and fails at one."""
    endpoint = f"ipc://{tmp_path_factory.mktemp('verbs')}/verbs.sock"

    def answer(request: Any, _data: Any) -> Any:
        if request.args.get("file") == "odd":
            return {"object": 1}
        upload = {"id": request.args.get("upload", "u"), "bytes": 1, "created_at": 1, "expires_at": 2}
        return upload | {"filename": "f", "purpose": "fine-tune", "status": "cancelled"}

    peer = VerbsPeer(endpoint, answer).start()
    server = ApiServer(endpoint).start()
    yield server
    server.stop()
    peer.stop()


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    said = answer.json()
    assert set(said) == {"error"} and {"message", "type", "param", "code"} <= set(said["error"])
    if status < 500 and status not in (408, 429):
        assert answer.headers["x-should-retry"] == "false"
    return said["error"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/files/",
            "/v1/files/a/b",
            "/v1/files//content",
            "/v1/uploads/u",
            "/v1/uploads/u/x",
            "/v1/uploads/",
        ),
        *(
            "/v1/fine_tuning",
            "/v1/fine_tuning/jabs",
            "/v1/files/a%2Fb",
            "/v1/files/a%0A/b%0A",
            "/v1/fine_tuning/%00",
        ),
    ],
)
def test_unknown_paths_are_404_in_openais_form(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "BREW"):
        if method == "GET" or path != "/v1/uploads/u":
            assert refusal(client.request(method, path), 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("PATCH", "/v1/files/f", "DELETE, GET"),
        ("POST", "/v1/files/f/content", "GET"),
        ("GET", "/v1/uploads", "POST"),
        ("DELETE", "/v1/uploads/u/cancel", "POST"),
        ("HEAD", "/v1/files", "GET, POST"),
        ("OPTIONS", "/v1/uploads", "POST"),
        ("BREW", "/v1/files", "GET, POST"),
    ],
)
def test_another_method_is_405_with_allow(client: httpx.Client, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert refusal(answer, 405)["code"] == "method_not_allowed"


def test_paths_beside_ours_are_the_apps(client: httpx.Client) -> None:
    for path in ("/v1/filesystem", "/v1/file", "/v2/files", "/v1"):
        assert client.get(path).json() == {"detail": "Not Found"}


UPLOAD = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({**UPLOAD, "colour": "red"}, "colour"),
        ({**UPLOAD, "bytes": "3"}, "bytes"),
        ({**UPLOAD, "bytes": 0}, "bytes"),
        ({**UPLOAD, "bytes": True}, "bytes"),
        ({**UPLOAD, "bytes": 1e300}, "bytes"),
        ({**UPLOAD, "bytes": 2.5}, "bytes"),
        ({**UPLOAD, "purpose": "vision"}, "purpose"),
        ({**UPLOAD, "purpose": None}, "purpose"),
        ({**UPLOAD, "filename": ""}, "filename"),
        ({**UPLOAD, "filename": "a\0b"}, "filename"),
        ({**UPLOAD, "idempotency_key": "k"}, "idempotency_key"),  # it is a header
        ({"filename": "a", "purpose": "fine-tune"}, "bytes"),
        ({**UPLOAD, "expires_after": 3}, "expires_after"),
        ({**UPLOAD, "expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
        ({**UPLOAD, "expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({**UPLOAD, "expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
        ({**UPLOAD, "expires_after": {"anchor": "created_at", "seconds": 3600, "x": 1}}, "expires_after.x"),
    ],
)
def test_a_field_that_is_not_accepted_is_named(client: httpx.Client, given: Any, param: str) -> None:
    error = refusal(client.post("/v1/uploads", json=given), 400)
    assert error["param"] == param and param.rsplit(".", 1)[-1] in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        *(b"[]", b"null", b"3", b'"a"', b"{", b"\xff{}", b'{"a": NaN}', b"{}{}", b'{"filename": "\xff"}'),
        *(b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a":' + b"[" * 100_000, b'{"filename": "\\ud800"}', b"\x00"),
        b'{"bytes": 1' + b"0" * 400 + b"}",
        b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(client: httpx.Client, sent: bytes) -> None:
    answer = client.post("/v1/uploads", content=sent, headers={"content-type": "application/json"})
    refusal(answer, 400)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"]
)
def test_another_content_type_is_refused(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/uploads", content=b"{}", headers={"content-type": kind})
    assert refusal(answer, 400)["code"] == "invalid_content_type"


def test_a_body_that_is_too_large_is_refused_announced_or_not(client: httpx.Client) -> None:
    large = b'{"filename": "' + b"a" * body.MAX_JSON_BYTES
    headers = {"content-type": "application/json"}
    assert refusal(client.post("/v1/uploads", content=large, headers=headers), 413)["code"] == "too_large"
    streamed = client.post("/v1/uploads", content=iter([large]), headers=headers)
    assert refusal(streamed, 413)["code"] == "too_large"


@pytest.mark.parametrize("header", ["content-encoding", "x-body-compressed"])
def test_a_compressed_body_is_refused(client: httpx.Client, header: str) -> None:
    answer = client.post("/v1/uploads", content=b"x", headers={header: "zstd"})
    assert refusal(answer, 400)["code"] == "invalid_content_encoding"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1&limit=2", "limit"),
        ("order=up", "order"),
        ("after=", "after"),
        ("colour=red", "colour"),
        ("after=%00", None),
        ("after=%ff", None),
        ("&".join(f"x{n}=1" for n in range(40)), None),
    ],
)
def test_a_query_that_is_not_accepted_is_refused(client: httpx.Client, query: str, param: Any) -> None:
    error = refusal(client.get(f"/v1/files?{query}"), 400)
    if param is not None:
        assert error["param"] == param
    refusal(client.get("/v1/files/f?limit=1"), 400)


@pytest.mark.parametrize("key", ["", "a" * 129, "\x7f", "a\tb"])
def test_idempotency_keys_are_checked_on_every_post(client: httpx.Client, key: str) -> None:
    headers = {"idempotency-key": key}
    for path in (
        "/v1/uploads",
        "/v1/uploads/u/cancel",
        "/v1/uploads/u/complete",
        "/v1/uploads/u/parts",
        "/v1/files",
    ):
        assert refusal(client.post(path, headers=headers, json={}), 400)["param"] == "Idempotency-Key"
    twice = [("idempotency-key", "a"), ("idempotency-key", "a")]
    assert refusal(client.post("/v1/uploads/u/cancel", headers=twice), 400)["param"] == "Idempotency-Key"


@pytest.mark.parametrize("name", ["x" * 129, "%00", "%0A", "%C3%A4"])
def test_an_id_that_nothing_can_have_is_a_404(client: httpx.Client, name: str) -> None:
    assert refusal(client.get(f"/v1/files/{name}"), 404)["param"] == "file_id"
    assert refusal(client.post(f"/v1/uploads/{name}/cancel"), 404)["param"] == "upload_id"


def test_no_body_is_an_empty_one_and_both_have_no_fields_here(client: httpx.Client) -> None:
    assert client.post("/v1/uploads/u/cancel").json()["id"] == "u"
    assert client.post("/v1/uploads/u/cancel", json={}).json()["status"] == "cancelled"
    assert refusal(client.post("/v1/uploads/u/cancel", json={"why": 1}), 400)["param"] == "why"


def test_a_defect_is_a_500_that_says_where_to_look(client: httpx.Client) -> None:
    answer = client.get("/v1/files/odd")
    assert refusal(answer, 500)["type"] == "server_error"
    assert "x-should-retry" not in answer.headers


def test_an_answer_names_no_one_who_may_not_ask(server: ApiServer) -> None:
    """The check comes before anything else is said: of unknown paths too."""
    for path in ("/v1/files", "/v1/files/f", "/v1/nothing", "/v1/fine_tuning/x", "/v1/files%0A"):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".encode())
            said = b""
            while piece := raw.recv(4096):
                said += piece
        status = 404 if path == "/v1/nothing" else 403
        assert said.startswith(f"HTTP/1.1 {status}".encode()), (path, said)

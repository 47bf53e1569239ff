"""The unmodified openai client, blocking and in asyncio, against the routes and the real
service."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from sglang_harli import run_paths
from sglang_harli.managers.http.openai.access import Access
from support.api_server import ApiServer
from support.service.service_fixture import ServiceUnderTest, until
from support.tokenizer import make_tokenizer_folder

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 40_000  # 1.4 MB: two pieces
LIMITS = {"max_file_size": "3MiB", "max_part_size": "1MiB", "max_files_size": "8MiB"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceUnderTest]:
    folder = tmp_path_factory.mktemp("service")
    rig = ServiceUnderTest(folder, make_tokenizer_folder(folder / "model"), peers=False, **LIMITS)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def server(service: ServiceUnderTest) -> Iterator[ApiServer]:
    endpoint = run_paths.verbs_endpoint(str(service.run_dir))
    server = ApiServer(endpoint, access=Access("secret"), **LIMITS).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def connection(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="secret") as client:
        yield client


@pytest.fixture
def client(connection: OpenAI) -> Iterator[OpenAI]:
    """Behind a test there are no files."""
    yield connection
    for file in connection.files.list():
        connection.files.delete(file.id)


def put(client: OpenAI, data: bytes = ROWS, name: str = "rows.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, data), purpose="fine-tune", **more)


# ------------------------------------------------------------------ files
def test_a_file_is_created_read_and_deleted(client: OpenAI) -> None:
    file = put(client, name="dätä rows.jsonl")
    assert (file.object, file.bytes, file.filename) == ("file", len(ROWS), "dätä rows.jsonl")
    assert (file.purpose, file.status, file.expires_at) == ("fine-tune", "processed", None)
    assert isinstance(file.created_at, int) and file._request_id.startswith("req_")
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id).status == "processed"
    answer = client.files.content(file.id)
    assert answer.read() == ROWS
    headers = answer.response.headers
    assert headers["content-disposition"] == (
        "attachment; filename=\"d_t_ rows.jsonl\"; filename*=UTF-8''d%C3%A4t%C3%A4%20rows.jsonl"
    )
    assert (headers["content-type"], headers["x-content-type-options"]) == (
        "application/octet-stream",
        "nosniff",
    )
    assert client.files.delete(file.id).deleted is True
    for gone in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError, match=file.id) as caught:
            gone(file.id)
        assert caught.value.code == "not_found"


def test_files_of_all_kinds_of_sources(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "from-disk.jsonl"
    path.write_bytes(ROWS)
    with path.open("rb") as opened:
        for source, name in ((path, path.name), (opened, path.name), (ROWS, "upload")):
            file = client.files.create(file=source, purpose="fine-tune")
            assert (file.filename, file.bytes) == (name, len(ROWS))


def test_pages(client: OpenAI) -> None:
    names = [put(client, b"x", f"{number}.jsonl").id for number in range(5)]
    assert [file.id for file in client.files.list()] == names[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == names  # page by page
    page = client.files.list(limit=2)
    assert page.has_more and [file.id for file in page.data] == names[:2:-1]
    assert client.files.list(purpose="fine-tune-results").data == []
    assert [file.id for file in client.files.list(purpose="fine-tune", after=names[1])] == names[:1]


def test_an_expiry_and_a_key_for_repeats(client: OpenAI) -> None:
    more: dict[str, Any] = {
        "expires_after": {"anchor": "created_at", "seconds": 3600},
        "extra_headers": {"Idempotency-Key": "once"},
    }
    file = put(client, **more)
    assert file.expires_at == file.created_at + 3600
    assert put(client, **more).id == file.id
    with pytest.raises(openai.BadRequestError) as caught:
        put(client, b"other", **more)
    assert caught.value.code == "idempotency_conflict"


@pytest.mark.parametrize(
    ("wrong", "kind", "code"),
    [
        ({"purpose": "vision"}, openai.BadRequestError, "invalid_value"),
        ({"file": ("a.jsonl", b"")}, openai.BadRequestError, "empty_file"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "unknown_parameter"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, openai.BadRequestError, "invalid_value"),
        ({"file": ("a.jsonl", b"x" * (3 << 20) + b"x")}, openai.APIStatusError, "too_large"),
        ({"extra_query": {"a": "b"}}, openai.BadRequestError, "unknown_parameter"),
    ],
)
def test_what_is_refused_is_refused_once(client: OpenAI, wrong: dict[str, Any], kind: Any, code: str) -> None:
    asked: list[int] = []
    http = httpx.Client(event_hooks={"response": [lambda answer: asked.append(answer.status_code)]})
    given: dict[str, Any] = {"file": ("a.jsonl", b"x"), "purpose": "fine-tune"} | wrong
    with client.with_options(http_client=http) as other, pytest.raises(kind) as caught:
        other.files.create(**given)
    assert caught.value.code == code and asked == [caught.value.status_code]
    assert list(client.files.list()) == []


def test_all_files_have_a_limit_together(client: OpenAI) -> None:
    for _ in range(2):
        put(client, b"x" * (3 << 20))
    with pytest.raises(openai.BadRequestError, match="--harli-max-files-size") as caught:
        put(client, b"x" * (3 << 20))
    assert caught.value.code == "storage_full"


def test_another_key_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="other").files.list()
    assert caught.value.code == "invalid_api_key"


def test_a_file_that_is_deleted_while_it_is_sent_comes_whole(client: OpenAI) -> None:
    file = put(client)
    with client.files.with_streaming_response.content(file.id) as answer:
        pieces = answer.iter_bytes(1000)
        got = next(pieces)
        client.files.delete(file.id)
        assert got + b"".join(pieces) == ROWS


# ------------------------------------------------------------------ as documented
def test_answers_have_their_documented_form(client: OpenAI, server: ApiServer) -> None:
    paths = server.app.openapi()["paths"]
    http = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"})

    def check(method: str, path: str, status: int, **request: Any) -> Any:
        names = {"file_id": request.pop("file", ""), "upload_id": request.pop("upload", "")}
        answer = http.request(method, path.format(**names), **request)
        assert answer.status_code == status, answer.text
        said = paths[path][method.lower()]["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), said)
        return answer.json()

    with http:
        file = check("POST", "/v1/files", 200, files={"file": ("a", b"x")}, data={"purpose": "fine-tune"})[
            "id"
        ]
        check("GET", "/v1/files", 200)
        check("GET", "/v1/files", 400, params={"limit": 0})
        check("GET", "/v1/files/{file_id}", 200, file=file)
        check("DELETE", "/v1/files/{file_id}", 200, file=file)
        check("DELETE", "/v1/files/{file_id}", 404, file=file)
        check("GET", "/v1/files/{file_id}/content", 404, file=file)
        body = {"filename": "a", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/plain"}
        upload = check("POST", "/v1/uploads", 200, json=body)["id"]
        part = check("POST", "/v1/uploads/{upload_id}/parts", 200, upload=upload, files={"data": ("a", b"x")})
        check("POST", "/v1/uploads/{upload_id}/complete", 400, upload=upload, json={"part_ids": []})
        check("POST", "/v1/uploads/{upload_id}/complete", 200, upload=upload, json={"part_ids": [part["id"]]})
        check("POST", "/v1/uploads/{upload_id}/cancel", 400, upload=upload)
        http.headers["Authorization"] = "Bearer other"
        check("GET", "/v1/files", 401)


# ------------------------------------------------------------------ uploads
def test_a_file_in_chunks(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(ROWS)
    digest = hashlib.md5(ROWS, usedforsecurity=False).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=1 << 20, md5=digest
    )
    assert (upload.status, upload.object) == ("completed", "upload")
    assert upload.file is not None and upload.file.filename == "large.jsonl"
    assert client.files.content(upload.file.id).read() == ROWS


def test_parts_in_their_order_and_uploads_that_are_given_up(client: OpenAI) -> None:
    upload = client.uploads.create(bytes=6, filename="a.jsonl", mime_type="text/plain", purpose="fine-tune")
    assert upload.status == "pending" and upload.expires_at > upload.created_at
    second, first = (client.uploads.parts.create(upload.id, data=data) for data in (b"def", b"abc"))
    assert first.upload_id == upload.id and first.object == "upload.part"
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id])
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None and client.files.content(done.file.id).read() == b"abcdef"
    given_up = client.uploads.create(bytes=6, filename="b", mime_type="text/plain", purpose="fine-tune")
    assert client.uploads.cancel(given_up.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.parts.create(given_up.id, data=b"x")
    assert caught.value.code == "invalid_state"
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")
    with pytest.raises(openai.APIStatusError) as large:
        client.uploads.create(bytes=4 << 20, filename="b", mime_type="text/plain", purpose="fine-tune")
    assert (large.value.status_code, large.value.code) == (413, "too_large")


# ------------------------------------------------------------------ asyncio, and a service that goes
def test_the_asyncio_client(client: OpenAI, server: ApiServer) -> None:
    async def scenario() -> None:
        async with AsyncOpenAI(base_url=server.base_url, api_key="secret") as other:
            files = await asyncio.gather(
                *(
                    other.files.create(file=(f"{number}.jsonl", b"x" * (number + 1)), purpose="fine-tune")
                    for number in range(8)
                )
            )
            assert [file.bytes for file in files] == list(range(1, 9))
            listed = [file.id async for file in other.files.list(limit=3)]
            assert sorted(listed) == sorted(file.id for file in files)
            assert (await other.files.wait_for_processing(files[0].id)).status == "processed"
            upload = await other.uploads.upload_file_chunked(
                file=ROWS,
                filename="large.jsonl",
                bytes=len(ROWS),
                mime_type="application/jsonl",
                purpose="fine-tune",
                part_size=1 << 20,
            )
            assert upload.file is not None
            assert (await other.files.content(upload.file.id)).read() == ROWS

    asyncio.run(scenario())


def test_a_restart_of_the_service_is_a_503_and_then_all_is_as_before(
    client: OpenAI, service: ServiceUnderTest, server: ApiServer
) -> None:
    file = put(client)
    service.service.kill()
    until(lambda: not server.calls.connected, "the loss")
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=0).files.list()
    answer = caught.value.response
    assert (answer.status_code, caught.value.code, answer.headers["retry-after"]) == (503, "unavailable", "2")
    service.service.start()
    until(lambda: server.calls.connected, "the connection")
    assert client.files.content(file.id).read() == ROWS

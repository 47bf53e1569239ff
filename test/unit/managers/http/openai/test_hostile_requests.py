"""Whatever comes over HTTP: an answer as the document says, no failure of the server, and not one
byte outside the run directory.

schemathesis makes requests of the document; names, ids, ranges and bodies that mean harm are
written by hand.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from sglang_harli import run_paths
from support.api_server import ApiServer
from support.schemathesis_run import run, statuses
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.tokenizer import make_tokenizer_folder

pytestmark = pytest.mark.long

MODEL = "org/tiny"
ROWS = "".join(json.dumps(row) + "\n" for row in pairs(8)).encode()
LIMITS = {"max_file_size": "1MiB", "max_part_size": "1MiB", "max_files_size": "32MiB"}
TOKEN = "zq7escaped"  # in no name that is there otherwise
EACH = 24  # of each kind of object, so that deleting some leaves others
EXAMPLES = 25  # of each operation; some hundred more come from its document

NAMES = (
    f"../../{TOKEN}",
    f"../../../../../../../../tmp/{TOKEN}",
    f"/tmp/{TOKEN}",
    f"/{TOKEN}",
    f"..\\..\\{TOKEN}",
    f"C:\\{TOKEN}",
    f"file:///tmp/{TOKEN}",
    f"~/{TOKEN}",
    f"$(touch {TOKEN})",
    f"; touch {TOKEN}",
    f"a/../../{TOKEN}",
    f"{TOKEN}/",
    f"..%2f..%2f{TOKEN}",
    f"{TOKEN}\u202etxt.exe",
    "..",
    ".",
    f"CON{TOKEN}",
    TOKEN * 30,
)


# ------------------------------------------------------------------ the server and what is around it
@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the run directory; the server works in it and has its home in it."""
    folder = tmp_path_factory.mktemp("around")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("work", "home"):
            (folder / name).mkdir()
        patch.chdir(folder / "work")
        patch.setenv("HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def service(around: Path) -> Iterator[ServiceUnderTest]:
    rig = ServiceUnderTest(around, make_tokenizer_folder(around / "model"), peers=False, **LIMITS)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def server(service: ServiceUnderTest) -> Iterator[ApiServer]:
    server = ApiServer(run_paths.verbs_endpoint(str(service.run_dir)), **LIMITS).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        client.fine_tuning.jobs.list()  # all is loaded
        yield client


@pytest.fixture
def untouched(around: Path, service: ServiceUnderTest, client: OpenAI) -> Iterator[None]:
    """Behind a test all around the run directory is as before, and no file has a name that came."""
    before = tree(around, service.run_dir)
    yield
    assert tree(around, service.run_dir) == before
    for name in NAMES:
        for base in (around / "work", service.run_dir, service.run_dir / "files", Path("/")):
            place = Path(os.path.normpath(base / name))
            assert TOKEN not in place.name or not os.path.lexists(place), place
    assert not list(service.run_dir.rglob(f"*{TOKEN}*"))
    assert service.service.alive and client.files.list().object == "list"


def tree(folder: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if path != without and without not in path.parents:
            state = path.lstat()
            found[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


# ------------------------------------------------------------------ by the document
def objects(client: OpenAI, server: ApiServer) -> dict[str, Any]:
    """Files, jobs and uploads with a part, for ``support.schemathesis_hooks``."""

    def file() -> str:
        return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id

    server.models.names |= {f"adapter-{number}" for number in range(EACH)}
    parts = {}
    for _ in range(EACH):
        upload = client.uploads.create(
            filename="rows.jsonl", purpose="fine-tune", bytes=len(ROWS), mime_type="text/jsonl"
        )
        parts[upload.id] = [client.uploads.parts.create(upload.id, data=ROWS).id]
    files = [file() for _ in range(EACH)]
    kept = file()  # no path names it, so nothing deletes it
    jobs = [client.fine_tuning.jobs.create(model=MODEL, training_file=kept).id for _ in range(EACH)]
    return {
        "file_id": files,
        "job_id": jobs,
        "upload_id": list(parts),
        "model": sorted(server.models.names),
        "parts": parts,
        "job": {"model": MODEL, "training_file": kept},
    }


def test_each_answer_is_as_documented(
    client: OpenAI, server: ApiServer, untouched: None, tmp_path: Path
) -> None:
    asked = run(
        server,
        tmp_path,
        objects(client, server),
        phases="coverage,fuzzing,stateful",
        examples=EXAMPLES,
    )
    for operation, seen in statuses(server, asked).items():
        assert 200 in seen and seen & {400, 404}, f"{operation}: {seen}"


# ------------------------------------------------------------------ by hand
def ask(
    server: ApiServer, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, Any, bytes]:
    """A request as it stands here, no client mends its path: the answer's status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | given).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def refused(found: tuple[int, Any, bytes]) -> None:
    status, _, body = found
    assert 400 <= status < 500, found
    assert set(json.loads(body)["error"]) >= {"message", "type", "param", "code"}


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    """A multipart body of (field, filename, bytes), names as they stand here, and its type."""
    body = b""
    for name, filename, data in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        body += f'--edge\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        body += data + b"\r\n"
    return body + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def post_json(server: ApiServer, path: str, body: Any) -> tuple[int, Any, bytes]:
    return ask(server, "POST", path, json.dumps(body).encode(), Content_Type="application/json")


def test_names_are_for_display(server: ApiServer, client: OpenAI, untouched: None) -> None:
    for name in NAMES:
        body, kind = form(("purpose", None, b"fine-tune"), ("file", name, ROWS))
        status, _, answer = ask(
            server,
            "POST",
            "/v1/files",
            body,
            Content_Type=kind,
            Idempotency_Key=name[:100] if name.isascii() else "plain",
        )
        assert status == 200, answer
        file = json.loads(answer)
        assert "/" not in file["filename"] and "\\" not in file["filename"]
        assert client.files.content(file["id"]).read() == ROWS
        upload = client.uploads.create(
            filename=name, purpose="fine-tune", bytes=len(ROWS), mime_type=f"../{TOKEN}"
        )
        part = client.uploads.parts.create(upload.id, data=(name, ROWS))
        whole = client.uploads.complete(upload.id, part_ids=[part.id]).file
        assert whole is not None and client.files.content(whole.id).read() == ROWS
        refused(post_json(server, "/v1/fine_tuning/jobs", {"model": MODEL, "training_file": name}))
        job = {"model": MODEL, "training_file": file["id"]}
        for more in (
            {"model": name},
            {"validation_file": name},
            {"seed": name},
            {"harli": {"resume_from": name}},
            {"harli": {"hyperparameters": {name: 1}}},
            {name: name},
        ):
            refused(post_json(server, "/v1/fine_tuning/jobs", job | more))
        found = client.fine_tuning.jobs.create(**job, metadata={"place": name, name[:64]: "a"})
        until(
            lambda found=found: client.fine_tuning.jobs.retrieve(found.id).status == "queued",
            "the job's place",
        )
        client.fine_tuning.jobs.cancel(found.id)
        client.files.delete(file["id"])
        client.files.delete(whole.id)


IDS = (
    "..", "%2e%2e", "..%2f..%2fmodel%2ftokenizer.json", "%2e%2e%2f%2e%2e%2fmodel%2ftokenizer.json",
    "%2fetc%2fpasswd", "..%5c..%5cmodel", "%00", "a%00b", "%0d%0aX-Evil:%20a", "%ff%fe", "%", "%zz",
    "file-%2e%2e%2f%2e%2e", "*", "?", "a;b", "~", "%F0%9F%92%A9", "a" * 200, "a" * 20_000, "%25%32%66",
    "file-" + "0" * 30, "None", "-1", "1e999", "{file_id}", "....//....//etc/passwd", "//etc/passwd",
)  # fmt: skip
PLACES = (
    ("GET", "/v1/files/{}"),
    ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"),
    ("POST", "/v1/uploads/{}/parts"),
    ("POST", "/v1/uploads/{}/complete"),
    ("POST", "/v1/uploads/{}/cancel"),
    ("GET", "/v1/fine_tuning/jobs/{}"),
    ("GET", "/v1/fine_tuning/jobs/{}/events"),
    ("POST", "/v1/fine_tuning/jobs/{}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{}/resume"),
)


def test_ids_name_nothing_else(server: ApiServer, untouched: None) -> None:
    part, kind = form(("data", "a", ROWS))
    for method, place in PLACES:
        body, said = b"", {}
        if place.endswith("/parts"):
            body, said = part, {"Content_Type": kind}
        elif place.endswith("/complete"):
            body, said = b'{"part_ids": ["../../a"]}', {"Content_Type": "application/json"}
        for given in IDS:
            status, _, answer = ask(server, method, place.format(given), body, **said)
            listed = given == "?" and place == "/v1/files/{}" and method == "GET"
            assert 400 <= status < 500 or listed, (method, place, given, status, answer)
            assert b"root:" not in answer


RANGES = (
    "bytes=0-", "bytes=0-0", "bytes=-1", "bytes=5-2", "bytes=999999999999999999999-", "bytes=-",
    "bytes=0-0,0-0,1-1", "bytes=" + ",".join(["0-"] * 500), "rows=0-1", "bytes=a-b", "-1", "bytes=0x0-1",
)  # fmt: skip


def test_ranges_cut_nothing_out(server: ApiServer, client: OpenAI, untouched: None) -> None:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    for given in RANGES:
        for name in ("Range", "Content_Range", "If_Range"):
            status, headers, body = ask(server, "GET", f"/v1/files/{file}/content", **{name: given})
            assert (status, body) == (200, ROWS)
            assert headers["Content-Length"] == str(len(ROWS)) and headers["Content-Range"] is None
    client.files.delete(file)


BODIES = (
    b"{", b"[]", b"null", b"1e999", b'"a"', b"\xff\xfe", b"\x00", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 5000,
    b'{"model": "\\u0000"}', b'{"model": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": 1, "model": 2}',
    b'{"__class__": "os.system", "__proto__": {"a": 1}}', b"\x80\x04\x95.", b"<!DOCTYPE a [<!ENTITY b SYSTEM 'c'>]>",
    json.dumps({"model": MODEL, "training_file": [["file-a"]]}).encode(), b" " * (1 << 21), b"\x1f\x8b\x08\x00",
)  # fmt: skip
_PART = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
FORMS = (
    b"", b"--edge", b"--edge--\r\n", b"no form", _PART, _PART + b"\r\nabc", _PART * 3, b"--edge\r\n\r\nabc\r\n--edge--\r\n",
    _PART + b"X: " + b"a" * 100_000 + b"\r\n\r\nb\r\n--edge--\r\n", (_PART + b"\r\na\r\n") * 200 + b"--edge--\r\n",
    _PART + b"Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n--edge--\r\n", form(("file", None, ROWS))[0],
    form(("purpose", None, b"fine-tune"))[0], 
    form(("file", "a", ROWS), ("purpose", None, b"\xff"))[0], form(("file", "a", ROWS), ("../" + TOKEN, None, b"a"))[0],
    form(("purpose", None, b"fine-tune" * 10_000), ("file", "a", ROWS))[0],
)  # fmt: skip


def test_bodies_are_refused(server: ApiServer, client: OpenAI, untouched: None) -> None:
    upload = client.uploads.create(filename="a", purpose="fine-tune", bytes=9, mime_type="text/jsonl").id
    for place in ("/v1/fine_tuning/jobs", "/v1/uploads", f"/v1/uploads/{upload}/complete"):
        for body in BODIES:
            for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
                refused(ask(server, "POST", place, body, Content_Type=kind))
    _, kind = form()
    for place in ("/v1/files", f"/v1/uploads/{upload}/parts"):
        for body in FORMS:
            refused(ask(server, "POST", place, body, Content_Type=kind))
        for other in (
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "application/json",
            "a" * 5000,
            f"multipart/form-data; boundary={'a' * 500}",
            'multipart/form-data; boundary="../a"',
        ):
            refused(ask(server, "POST", place, FORMS[-1], Content_Type=other))
        refused(ask(server, "POST", place, FORMS[-1], Content_Type=kind, Content_Encoding="gzip"))
    client.uploads.cancel(upload)

"""A file's bytes from a request to the service: in order, bounded, and forgotten where it ends
early."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.managers.http.openai.forms import form_stream, stream_sender
from sglang_harli.protocol.calls.files import MAX_PIECE_BYTES
from support.api_server import ApiServer
from support.service.service_fixture import until
from support.service.verbs_peer import Streams, VerbsPeer

DATA = hashlib.shake_128(b"data").digest(3 * MAX_PIECE_BYTES + 12_345)
LIMIT = len(DATA)
BOUNDARY = "b0undary"
TYPE = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def peer(tmp_path: Path, streams: Streams) -> Iterator[VerbsPeer]:
    peer = VerbsPeer(f"ipc://{tmp_path}/verbs.sock", streams).start()
    yield peer
    peer.stop()


@pytest.fixture
def server(peer: VerbsPeer, tmp_path: Path) -> Iterator[ApiServer]:
    server = ApiServer(f"ipc://{tmp_path}/verbs.sock", max_file_size=str(LIMIT), max_part_size="1MiB").start()
    yield server
    server.stop()


def field(name: str, value: str) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode() + value.encode() + b"\r\n"


def file(data: bytes, name: str = "file") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.jsonl"\r\n\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
PURPOSE = field("purpose", "fine-tune")


def send(server: ApiServer, *parts: bytes, streamed: bool = False, path: str = "/v1/files") -> httpx.Response:
    content: Any = iter(parts) if streamed else b"".join(parts)
    return httpx.post(f"{server.url}{path}", content=content, headers=TYPE, timeout=60)


def code(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["code"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", [1, MAX_PIECE_BYTES, MAX_PIECE_BYTES + 1, LIMIT])
def test_a_file_comes_whole(
    server: ApiServer, peer: VerbsPeer, streams: Streams, size: int, streamed: bool
) -> None:
    parts = (PURPOSE, file(DATA[:size]), END) if streamed else (file(DATA[:size]), PURPOSE, END)
    answer = send(server, *parts, streamed=streamed)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["bytes"], answer.json()["filename"]) == (size, "a.jsonl")
    assert streams.whole == [DATA[:size]]
    offsets = [request.args["offset"] for request in peer.asked if request.verb == "file_append"]
    assert sorted(offsets) == list(range(0, size, MAX_PIECE_BYTES))


def test_fields_may_come_before_and_behind(server: ApiServer, peer: VerbsPeer) -> None:
    anchor, seconds = field("expires_after[anchor]", "created_at"), field("expires_after[seconds]", "3600")
    assert send(server, anchor, file(b"x"), PURPOSE, seconds, END).status_code == 200
    assert peer.asked[-1].args["expires_after"] == {"anchor": "created_at", "seconds": 3600}


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([file(b"x"), END], "purpose"),
        ([file(b""), PURPOSE, END], "file"),
        ([PURPOSE, END], "file"),
        ([field("purpose", "vision"), file(b"x"), END], "purpose"),
        ([PURPOSE, file(b"x"), field("expires_after[seconds]", "3600"), END], "expires_after.anchor"),
        ([PURPOSE, file(b"x"), field("expires_after[seconds]", "ten"), END], "expires_after[seconds]"),
        ([PURPOSE, file(b"x"), field("expires_after[seconds]", "10"), END], "expires_after[seconds]"),
        ([PURPOSE, file(b"x"), PURPOSE, END], "purpose"),
        ([PURPOSE, file(b"x"), field("colour", "red"), END], "colour"),
        ([PURPOSE, file(DATA[: 2 * MAX_PIECE_BYTES]), field("colour", "red"), END], "colour"),
        ([PURPOSE, file(DATA[: 2 * MAX_PIECE_BYTES])], None),
    ],
)
def test_a_form_that_is_not_accepted_leaves_nothing(
    server: ApiServer, streams: Streams, parts: list[bytes], param: str | None
) -> None:
    answer = send(server, *parts)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not streams.data


def test_too_large_a_file_is_refused_before_it_is_read_and_while_it_streams(
    server: ApiServer, streams: Streams, peer: VerbsPeer
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {TYPE['content-type']}\r\n"
        raw.sendall(f"{head}Content-Length: {LIMIT + (1 << 20)}\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")  # not one byte of the body was sent
    assert not peer.asked
    answer = send(server, PURPOSE, file(DATA + b"x"), END, streamed=True)
    assert code(answer, 413) == "too_large" and "--harli-max-file-size" in answer.json()["error"]["message"]
    assert not streams.data
    part = send(server, file(DATA[: MAX_PIECE_BYTES + 1], "data"), END, path="/v1/uploads/u/parts")
    assert code(part, 413) == "too_large" and "--harli-max-part-size" in part.json()["error"]["message"]
    assert code(send(server, PURPOSE, field("x", "a" * 5000), END), 400) == "unknown_parameter"
    besides = (b"\r\n" * form_stream.OVERHEAD,)
    assert code(send(server, *besides, PURPOSE, file(b"x"), END), 413) == "too_large"


def test_a_part_comes_whole(server: ApiServer, peer: VerbsPeer, streams: Streams) -> None:
    answer = send(server, file(DATA[:MAX_PIECE_BYTES], "data"), END, path="/v1/uploads/upload_7/parts")
    assert (answer.status_code, answer.json()["upload_id"]) == (200, "upload_7")
    assert streams.whole == [DATA[:MAX_PIECE_BYTES]]
    assert {request.args["part"] for request in peer.asked if request.verb == "file_append"} == {True}


def test_a_connection_that_is_gone_leaves_nothing(server: ApiServer, streams: Streams) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {TYPE['content-type']}\r\n"
        raw.sendall(f"{head}Content-Length: {LIMIT}\r\n\r\n".encode() + PURPOSE + file(DATA)[: 2 << 20])
        until(lambda: streams.data, "the first piece")
    until(lambda: streams.aborted, "the end of the stream")
    assert not streams.data
    assert send(server, PURPOSE, file(b"x"), END).status_code == 200


def refusing(times: int, error: Callable[[], HarliError], first: bool = False) -> Callable[[int], None]:
    left = iter(range(times))

    def unwell(offset: int) -> None:
        if (first or offset) and next(left, None) is not None:
            raise error()

    return unwell


@pytest.mark.parametrize(
    "streams",
    [Streams(refusing(5, lambda: NotReadyError("wait", code="busy"), first)) for first in (False, True)],
)
def test_a_busy_service_gets_its_pieces_again_in_order(server: ApiServer, streams: Streams) -> None:
    assert send(server, PURPOSE, file(DATA), END).status_code == 200
    assert streams.whole == [DATA]


@pytest.mark.parametrize("streams", [Streams(refusing(9**9, lambda: NotReadyError("wait", code="busy")))])
def test_a_service_that_stays_busy_is_a_429(
    server: ApiServer, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_sender, "BUSY_S", 0.1)
    assert code(send(server, PURPOSE, file(DATA), END), 429) == "busy"
    assert not streams.data


@pytest.mark.parametrize(
    "streams", [Streams(refusing(9**9, lambda: HarliError("the disk is full", code="storage_full")))]
)
def test_a_refusal_while_it_streams_ends_it(server: ApiServer, streams: Streams) -> None:
    answer = send(server, PURPOSE, file(DATA), END)
    assert code(answer, 400) == "storage_full"
    assert answer.headers["x-should-retry"] == "false"
    assert not streams.data


def test_only_so_many_files_are_read_at_once(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_stream, "MAX_FORMS", 0)
    answer = send(server, PURPOSE, file(b"x"), END)
    assert code(answer, 429) == "busy" and answer.headers["retry-after"] == "1"


def test_a_body_that_does_not_go_on_is_ended(
    server: ApiServer, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_harli.managers.http.openai.body.IDLE_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {TYPE['content-type']}\r\n"
        raw.sendall(f"{head}Content-Length: {LIMIT}\r\n\r\n".encode() + PURPOSE)
        assert raw.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_service_that_goes_is_a_503_at_once_and_the_next_one_serves(
    server: ApiServer, peer: VerbsPeer, streams: Streams
) -> None:
    def body() -> Iterator[bytes]:
        yield PURPOSE + file(DATA)[: 2 << 20]
        until(lambda: streams.data, "the first piece")
        peer.stop()
        yield file(DATA)[2 << 20 :] + END

    answer = httpx.post(f"{server.url}/v1/files", content=body(), headers=TYPE, timeout=60)
    assert code(answer, 503) == "unavailable" and answer.headers["retry-after"] == "2"
    streams.data.clear()
    peer.start()
    until(lambda: server.calls.connected, "the connection")
    assert send(server, PURPOSE, file(DATA), END).status_code == 200
    assert streams.whole == [DATA]

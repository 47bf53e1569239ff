"""A file as a response: whole, closed in any case, and saved under a harmless name."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.errors import HarliError, NotFoundError
from sglang_harli.managers.http.openai import content as module
from sglang_harli.managers.http.openai.content import content, disposition
from sglang_harli.protocol.calls.files import FilePath

DATA = bytes(range(256)) * 4096  # four pieces


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file-1"
    path.write_bytes(DATA)
    return path


def sent(path: Path, leave_after: int | None = None) -> bytes:
    """What comes of the response; the client leaves after so many messages."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if len(messages) == leave_after:
            raise OSError("the client is gone")
        messages.append(message)

    async def scenario() -> None:
        response = await content(FilePath(path=str(path), bytes=1, filename="rows.jsonl"))
        path.unlink()  # it goes on all the same
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        try:
            await response(scope, receive, send)
        finally:
            await asyncio.to_thread(lambda: response._reading and response._reading.result())
            assert response._file.closed

    asyncio.run(scenario())
    return b"".join(message.get("body", b"") for message in messages)


def test_it_is_sent_whole_and_closed(path: Path) -> None:
    assert sent(path) == DATA


@pytest.mark.parametrize("messages", [0, 1, 2])
def test_it_is_closed_where_the_client_leaves(path: Path, messages: int) -> None:
    with pytest.raises(Exception, match=r"|the client is gone") as caught:
        sent(path, messages)
    assert "ClientDisconnect" in repr(caught.value)


def test_a_file_that_is_not_there_any_more_is_a_404(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="rows was deleted just now"):
        asyncio.run(content(FilePath(path=str(tmp_path / "none"), bytes=1, filename="rows")))


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    os.symlink(path, tmp_path / "link")
    with pytest.raises(HarliError, match="rows cannot be read") as caught:
        asyncio.run(content(FilePath(path=str(tmp_path / "link"), bytes=1, filename="rows")))
    assert caught.value.code == "internal"


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a;b", "ä", "100%", "a b", "..", "\u202e"])
def test_the_name_is_quoted(name: str) -> None:
    said = disposition(name)
    assert said.isascii() and said.count('"') == 2
    assert said.startswith("attachment; filename=") and "filename*=UTF-8''" in said
    assert module.quote(name, safe="") in said

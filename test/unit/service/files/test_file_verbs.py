"""Files and uploads at the inner endpoint of the real service."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
from pathlib import Path

import msgspec
import pytest

from sglang_harli.errors import (
    ConfigError,
    HarliError,
    NotFoundError,
    NotReadyError,
    ProtocolError,
    StateError,
)
from sglang_harli.failpoints import FileFailpoint, WriteFailpoint
from sglang_harli.protocol.calls.files import ExpiresAfter
from support.service.service_fixture import until

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 40_000  # 1.4 MB: two pieces


def test_a_file_is_kept_as_it_came(inner, service):
    file = inner.file(ROWS, filename="../../etc/rows.jsonl")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(ROWS),
        "../../etc/rows.jsonl",
        "fine-tune",
        "processed",
    )
    assert inner.content(file.id) == ROWS
    assert inner.call("file_get", {"file": file.id}) == _plain(file)
    assert [p.name for p in (service.run_dir / "files").iterdir()] == [file.id]
    assert inner.call("file_delete", {"file": file.id})["deleted"] is True
    assert list((service.run_dir / "files").iterdir()) == []
    for verb in ("file_get", "file_delete", "file_path"):
        with pytest.raises(NotFoundError, match=file.id):
            inner.call(verb, {"file": file.id})


def _plain(file) -> dict:
    return {name: getattr(file, name) for name in file.__struct_fields__}


def test_pages_go_on_behind_files_that_are_deleted_meanwhile(inner):
    files = [inner.file(b"x" * (n + 1), filename=f"{n}.jsonl") for n in range(7)]
    names = [file.id for file in reversed(files)]
    seen: list[str] = []
    page = inner.listed(limit=3)
    while True:
        seen += [file.id for file in page.data]
        for file in page.data:
            inner.call("file_delete", {"file": file.id})
        if not page.has_more:
            break
        page = inner.listed(limit=3, after=page.last_id)
    assert seen == names
    assert inner.listed().data == [] and inner.listed().first_id is None


def test_lists_in_both_orders_and_by_purpose(inner):
    first, second = inner.file(b"1"), inner.file(b"2")
    assert [f.id for f in inner.listed(order="asc").data] == [first.id, second.id]
    assert [f.id for f in inner.listed(order="asc", after=first.id).data] == [second.id]
    assert inner.listed(purpose="fine-tune-results").data == []
    for wrong in ({"purpose": "vision"}, {"order": "up"}, {"limit": 0}, {"limit": 10_001}):
        with pytest.raises((ConfigError, ProtocolError)):
            inner.call("file_list", wrong)
    for wrong in ("nothing", "file-5", "file--" + "0" * 33, first.id + "0"):
        with pytest.raises(NotFoundError) as caught:
            inner.listed(after=wrong)
        assert caught.value.param == "after"


def test_a_key_makes_one_file_and_another_body_is_refused(inner, service):
    args = inner.complete_args(ROWS, idempotency_key="k1")
    first = inner.call("file_complete", args)
    again = inner.complete_args(ROWS, idempotency_key="k1")
    assert inner.call("file_complete", again) == first
    for other in ({"filename": "other.jsonl"}, {"expires_after": ExpiresAfter("created_at", 3600)}):
        with pytest.raises(HarliError, match=next(iter(other))) as caught:
            inner.call("file_complete", inner.complete_args(ROWS, idempotency_key="k1", **other))
        assert caught.value.code == "idempotency_conflict"
    with pytest.raises(HarliError, match="content"):
        inner.file(b"other", idempotency_key="k1")
    assert [file.id for file in inner.listed().data] == [first["id"]]
    assert list((service.run_dir / ".streams").iterdir()) == []


def test_two_requests_with_one_key_at_once_make_one_file(inner):
    args = [inner.complete_args(ROWS, idempotency_key="both") for _ in range(4)]
    requests = [inner.send("file_complete", each) for each in args]
    answers = {}
    while len(answers) < len(requests):
        reply = msgspec.json.decode(inner._socket.recv())
        answers[reply["id"]] = reply["result"]["id"]
    assert len(set(answers.values())) == 1
    assert len(inner.listed().data) == 1


def test_limits_are_refused_while_the_bytes_come(inner, service):
    with pytest.raises(HarliError, match="--harli-max-file-size") as caught:
        inner.stream(b"x" * (3 << 20) + b"y")
    assert caught.value.code == "too_large"
    with pytest.raises(HarliError, match="--harli-max-part-size"):
        inner.stream(b"x" * ((1 << 20) + 1), part=True)
    with pytest.raises(HarliError, match=r"this one has 5\.0 MiB"):
        inner.call("file_append", {"stream": "0" * 32, "offset": 0, "expected": 5 << 20}, b"x")
    first = inner.upload(3 << 20, idempotency_key="room")
    kept = [inner.file(bytes([n]) * (3 << 20)) for n in range(2)]
    assert inner.upload(3 << 20, idempotency_key="room").id == first.id  # asked again: it takes no more room
    with pytest.raises(HarliError, match="--harli-max-files-size"):
        inner.upload(3 << 20)
    with pytest.raises(HarliError, match="--harli-max-files-size") as caught:
        inner.file(b"z" * (3 << 20))
    assert caught.value.code == "storage_full"
    inner.call("file_delete", {"file": kept[0].id})
    inner.file(b"z" * (3 << 20))
    until(lambda: not list((service.run_dir / ".streams").iterdir()), "the refused streams' end")


def test_streams_that_are_not_whole_make_no_file(inner):
    name = inner.stream(b"abc")
    wrong = inner.complete_args(b"abc")
    wrong.size = 4
    with pytest.raises(ProtocolError, match="3 bytes"):
        inner.call("file_complete", wrong)
    with pytest.raises(ProtocolError, match="for 7"):
        inner.call("file_append", {"stream": name, "offset": 7}, b"x")
    inner.call("file_abort", {"stream": name})
    with pytest.raises(NotReadyError, match=name):
        inner.call("file_append", {"stream": name, "offset": 3}, b"x")
    for bad in ("vision", "", "fine-tune-results"):
        with pytest.raises(ConfigError, match="purpose"):
            inner.file(b"abc", purpose=bad)
    with pytest.raises(HarliError, match="stream"):
        inner.call("file_append", {"stream": "../../../x", "offset": 0}, b"x")
    assert inner.listed().data == []


def test_an_upload_of_parts_in_the_order_that_is_asked_for(inner, service):
    one, two = b"1" * 500_000, b"2" * 700_000
    upload = inner.upload(len(one) + len(two), mime_type="text/jsonl")
    assert (upload.status, upload.expires_at - upload.created_at) == ("pending", 3600)
    second, first = inner.part(upload.id, two), inner.part(upload.id, one)
    md5 = hashlib.md5(one + two).hexdigest()
    args = {"upload": upload.id, "part_ids": [first.id, second.id], "md5": md5}
    for change, error in (
        ({"part_ids": [first.id]}, "500000 bytes"),
        ({"part_ids": [first.id, first.id]}, "twice"),
        ({"part_ids": [first.id, "part_0"]}, "part_ids\\[1\\]"),
        ({"part_ids": [second.id, first.id]}, "MD5"),
    ):
        with pytest.raises(ConfigError, match=error):
            inner.call("upload_complete", args | change)
    done = inner.call("upload_complete", args)
    assert done["status"] == "completed" and done["file"]["bytes"] == len(one) + len(two)
    assert inner.content(done["file"]["id"]) == one + two
    assert inner.call("upload_complete", args) == done  # asked again
    assert list((service.run_dir / "parts").iterdir()) == []
    with pytest.raises(StateError, match="completed"):
        inner.part(upload.id, b"3")
    with pytest.raises(StateError, match="other part_ids"):
        inner.call("upload_complete", args | {"part_ids": [second.id]})
    with pytest.raises(StateError, match="cannot be cancelled"):
        inner.call("upload_cancel", {"upload": upload.id})


def test_a_cancelled_upload_leaves_no_bytes(inner, service):
    upload = inner.upload(3, idempotency_key="u")
    assert inner.upload(3, idempotency_key="u").id == upload.id
    with pytest.raises(HarliError, match="bytes"):
        inner.upload(4, idempotency_key="u")
    part = inner.part(upload.id, b"123", idempotency_key="p")
    assert inner.part(upload.id, b"123", idempotency_key="p").id == part.id
    with pytest.raises(HarliError, match="data"):
        inner.part(upload.id, b"124", idempotency_key="p")
    assert inner.call("upload_cancel", {"upload": upload.id})["status"] == "cancelled"
    assert inner.call("upload_cancel", {"upload": upload.id})["status"] == "cancelled"
    assert list((service.run_dir / "parts").iterdir()) == []
    with pytest.raises(StateError, match="cancelled"):
        inner.call("upload_complete", {"upload": upload.id, "part_ids": [part.id]})
    with pytest.raises(HarliError, match="--harli-max-file-size"):
        inner.upload(4 << 20)


def test_a_full_disk_is_a_refusal_and_leaves_nothing(inner, service):
    (service.points / WriteFailpoint.FILE).write_text("error ENOSPC 1")
    with pytest.raises(HarliError, match="make room") as caught:
        inner.file(b"abc")
    assert caught.value.code == "storage_full"
    (service.points / WriteFailpoint.FILE).write_text("error ENOSPC 2")
    with pytest.raises(HarliError, match="make room"):
        inner.file(b"abc")
    (service.points / WriteFailpoint.FILE).unlink(missing_ok=True)
    assert inner.listed().data == []
    until(lambda: not list((service.run_dir / ".streams").iterdir()), "the end of the stream")
    assert list((service.run_dir / "files").iterdir()) == []


def killed_at(service, inner, point: FileFailpoint, verb: str, args) -> None:
    """The service is killed where it stands at this point, and started again."""
    (service.points / point).write_text("stop")
    inner.send(verb, args)
    hit = service.points / f"{point}.hit"
    until(hit.exists, f"the service at {point}")
    os.kill(int(hit.read_text()), signal.SIGKILL)
    service.service.process.wait()
    hit.unlink()
    service.service.start()
    service.client.status()


@pytest.mark.parametrize("first", [b"", b"whole"])
def test_a_kill_when_a_file_is_stored_neither_loses_nor_doubles_it(inner, service, first):
    kept = inner.file(b"kept", idempotency_key=f"kept {len(first)}") if first else None
    args = inner.complete_args(b"rows" + first, idempotency_key="killed")
    killed_at(service, inner, FileFailpoint.FILE_STORED, "file_complete", args)
    assert list((service.run_dir / ".streams").iterdir()) == []
    assert [f.id for f in inner.listed().data] == ([kept.id] if kept else [])
    assert len(list((service.run_dir / "files").iterdir())) == (1 if kept else 0)  # unknown bytes are gone
    again = inner.file(b"rows" + first, idempotency_key="killed")
    service.restart()
    assert inner.file(b"rows" + first, idempotency_key="killed").id == again.id  # known over a restart
    assert inner.content(again.id) == b"rows" + first


def test_a_kill_within_an_upload_keeps_what_was_acknowledged(inner, service):
    upload = inner.upload(6)
    one = inner.part(upload.id, b"one")
    two = inner.part_args(upload.id, b"two", idempotency_key="two")
    killed_at(service, inner, FileFailpoint.PART_STORED, "part_complete", two)
    assert [p.name for p in (service.run_dir / "parts").iterdir()] == [one.id]
    two = inner.part(upload.id, b"two", idempotency_key="two")
    args = {"upload": upload.id, "part_ids": [one.id, two.id]}
    killed_at(service, inner, FileFailpoint.UPLOAD_COMPLETED, "upload_complete", args)
    assert inner.listed().data == []
    assert {p.name for p in (service.run_dir / "parts").iterdir()} == {one.id, two.id}
    done = inner.call("upload_complete", args)
    assert inner.content(done["file"]["id"]) == b"onetwo"
    service.restart()
    assert inner.call("upload_complete", args) == done
    assert len(inner.listed().data) == 1


def test_a_repeated_answer_is_durable_too(inner, service):
    """The store is locked: neither the first answer nor a repeated one comes before it is open."""
    db = sqlite3.connect(service.run_dir / "harli.db", timeout=0.1, isolation_level=None)
    db.execute("begin immediate")
    requests = [
        inner.send("file_complete", inner.complete_args(b"locked", idempotency_key="locked"))
        for _ in range(2)
    ]
    try:
        assert inner._socket.poll(1500) == 0
    finally:
        db.execute("rollback")
        db.close()
    assert len({msgspec.json.decode(inner._socket.recv())["result"]["id"] for _ in requests}) == 1


def test_what_is_none_of_ours_does_not_keep_the_service_from_starting(inner, service):
    service.service.kill()
    strays = [service.run_dir / "parts" / "a folder", service.run_dir / "files" / "a folder"]
    for stray in strays:
        stray.mkdir()
    service.service.start()
    service.client.status()
    kept = inner.file(b"kept")
    assert all(stray.is_dir() for stray in strays) and inner.content(kept.id) == b"kept"
    for stray in strays:
        stray.rmdir()


def test_what_expires_is_removed(own_clock_service):
    """The file and the upload are of a service whose clock is past their end."""
    inner, files = own_clock_service
    assert inner.listed().data == []
    assert not list(files.iterdir())


@pytest.fixture
def own_clock_service(inner, service):
    """What an hour does: the records are written as if they had been made an hour ago."""
    file = inner.file(b"short", expires_after=ExpiresAfter("created_at", 3600))
    upload = inner.upload(3)
    part = inner.part(upload.id, b"123")
    service.service.kill()
    with sqlite3.connect(service.run_dir / "harli.db") as db:
        for name in (file.id, upload.id):
            (body,) = db.execute("select body from objects where id = ?", [name]).fetchone()
            record = json.loads(body)
            record["expires_at"] -= 4000
            db.execute("update objects set body = ? where id = ?", [json.dumps(record), name])
    db.close()
    service.service.start()
    service.client.status()
    with pytest.raises(StateError, match="expired"):
        inner.call("upload_complete", {"upload": upload.id, "part_ids": [part.id]})
    until(lambda: not list((service.run_dir / "parts").iterdir()), "the end of the upload")
    until(lambda: not list((service.run_dir / "files").iterdir()), "the end of the file")
    return inner, Path(service.run_dir / "files")

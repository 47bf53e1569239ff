"""Large files through the real service: in bounded memory, across lost connections, and refused by
name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.errors import ConfigError, DataError, HarliError
from sglang_harli.protocol import public
from sglang_harli.service.submit import uploads
from support.data_files import write_large
from support.service.service_fixture import exchange, pairs, until

MIB = 1 << 20
CHUNK = public.MAX_FRAME_BYTES
LARGE_MIB = int(os.environ.get("HARLI_TEST_UPLOAD_MIB", "200"))  # 1024 for a gigabyte


def upload_args(number: int, content: bytes, offset: int = 0, **changes) -> dict:
    args = {
        "upload": f"{number:032x}",
        "filename": "f.jsonl",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "offset": offset,
    }
    return args | changes


def left_behind(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if path.name.startswith((".upload-", ".incoming-"))]


# ------------------------------------------------------------------ size
def test_a_large_file_goes_through_in_bounded_memory(own, tmp_path):
    rig = own(peers=False)
    path = write_large(tmp_path / "large.jsonl", LARGE_MIB)
    rig.client.status()
    rig.client.submit(pairs(2))  # tokenizer and all are loaded
    service, me = psutil.Process(rig.service.process.pid), psutil.Process()
    before, mine = service.memory_info().rss, me.memory_info().rss
    most = [before, mine]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], service.memory_info().rss)
            most[1] = max(most[1], me.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        job = rig.client.submit(path)
    finally:
        done.set()
        thread.join()
    assert job.data["bytes"] == path.stat().st_size > (LARGE_MIB - 1) * MIB
    assert job.data["rows"] == 4 * LARGE_MIB
    assert (most[0] - before) < 64 * MIB, f"the service grew by {(most[0] - before) / MIB:.0f} MiB"
    assert (most[1] - mine) < 64 * MIB, f"the client grew by {(most[1] - mine) / MIB:.0f} MiB"
    assert left_behind(rig.run_dir) == []


def test_rows_spool_to_a_file(rig):
    rows = ({"prompt": "a", "completion": "b", "note": "x" * MIB} for _ in range(20))
    assert rig.client.submit(rows).data["rows"] == 20


# ------------------------------------------------------------------ lost connections
def test_an_upload_survives_a_killed_service(own, tmp_path):
    rig = own(peers=False)
    path = write_large(tmp_path / "large.jsonl", 48)
    told: list[str] = []
    found: list[public.Job] = []

    def submit() -> None:
        with FinetuneClient(rig.service.endpoint, on_connection=told.append) as client:
            found.append(client.submit(path, idempotency_key="once"))

    rig.client.status()
    thread = threading.Thread(target=submit)
    thread.start()
    for _ in range(2):
        until(lambda: left_behind(rig.run_dir), "the upload's folder")
        rig.restart()
    thread.join(60)
    assert found and found[0].data["rows"] == 192
    assert told[:2] == ["connection lost, trying again", "connected again"]
    assert [job.id for job in rig.client.list()] == [found[0].id]
    assert left_behind(rig.run_dir) == []


# ------------------------------------------------------------------ the raw verb
def test_chunks_twice_late_and_out_of_order(rig):
    content = b"".join(json.dumps(pair).encode() + b"\n" for pair in pairs(200))
    third = len(content) // 3
    cuts = [content[:third], content[third : 2 * third], content[2 * third :]]

    def send(part: int, offset: int) -> int:
        return exchange(rig, "upload", upload_args(1, content, offset), cuts[part])["offset"]

    with pytest.raises(ConfigError, match="offset 0") as caught:
        send(1, third)
    assert caught.value.code == "upload_unknown"
    assert send(0, 0) == third
    assert send(2, 2 * third) == third  # a gap
    assert send(0, 0) == third  # a repetition
    assert send(1, third) == 2 * third
    submit = {"filename": "f", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    submit |= {"upload": f"{1:032x}", "idempotency_key": "raw"}
    with pytest.raises(ConfigError, match=r"holds .* of .* bytes"):
        exchange(rig, "submit", submit)
    assert send(2, 2 * third) == len(content)
    with pytest.raises(ConfigError, match="give one of the two"):
        exchange(rig, "submit", submit, b"more")
    job = exchange(rig, "submit", submit)["id"]
    assert exchange(rig, "submit", submit)["id"] == job  # the same key; the upload is gone
    with pytest.raises(ConfigError, match="no upload") as caught:
        exchange(rig, "submit", submit | {"idempotency_key": "another"})
    assert caught.value.code == "upload_unknown"
    assert left_behind(rig.run_dir) == []


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"size": public.MAX_DATA_BYTES + 1}, "too_large", f"at most {public.MAX_DATA_BYTES}"),
        ({"sha256": "0" * 64}, "data_mismatch", "sha256"),
        ({"size": 2}, "data_mismatch", "more than the 2 bytes"),
        ({"upload": "../../evil"}, "bad_request", "upload"),
        ({"upload": "A" * 32}, "bad_request", "upload"),
        ({"upload": "0" * 32 + "\n"}, "bad_request", "upload"),
        ({"offset": -1}, "bad_request", "offset"),
        ({"size": 0}, "bad_request", "size"),
    ],
)
def test_refusals_name_the_limit(rig, changes, code, text):
    with pytest.raises(ConfigError, match=text) as caught:
        exchange(rig, "upload", upload_args(2, b"abc", **changes), b"abc")
    assert caught.value.code == code
    until(lambda: left_behind(rig.run_dir) == [], "an empty folder")


def test_a_chunk_is_one_frame(rig):
    for frames in ([], [b""], [b"a", b"b"]):
        with pytest.raises(ConfigError, match="one frame"):
            exchange(rig, "upload", upload_args(3, b"ab"), *frames)


def test_files_that_are_too_large_for_their_place_are_refused(rig, tmp_path):
    free = shutil.disk_usage(rig.run_dir).free
    if free < public.MAX_DATA_BYTES:
        with pytest.raises(ConfigError, match="are free") as caught:
            exchange(rig, "upload", upload_args(4, b"abc", size=free + MIB), b"abc")
        assert caught.value.code == "storage"
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.truncate(public.MAX_DATA_BYTES + 1)
    with pytest.raises(DataError, match=str(public.MAX_DATA_BYTES)):
        rig.client.submit(path)
    frames = [b"x" * CHUNK] * 17
    args = {"filename": "f", "size": 17 * CHUNK, "sha256": hashlib.sha256(b"".join(frames)).hexdigest()}
    with pytest.raises(ConfigError, match="by `upload` first") as caught:
        exchange(rig, "submit", args, *frames)
    assert caught.value.code == "too_large"


def test_uploads_at_once_are_bounded_and_clients_wait_their_turn(own):
    rig = own(peers=False)
    rig.client.status()
    content = b"x" * (CHUNK + 1)
    for number in range(uploads.MAX_UPLOADS):
        exchange(rig, "upload", upload_args(number, content), content[:CHUNK])
    with pytest.raises(ConfigError, match=f"at most {uploads.MAX_UPLOADS}") as caught:
        exchange(rig, "upload", upload_args(99, content), content[:CHUNK])
    assert caught.value.code == public.BUSY
    row = b'{"prompt": "a", "completion": "b"}' + b" " * 2 * MIB + b"\n"
    jobs: list[public.Job] = []
    thread = threading.Thread(target=lambda: jobs.append(rig.client.submit(row)))
    thread.start()
    assert not jobs
    with pytest.raises(ConfigError, match="sha256"):  # the end of one that was begun
        exchange(rig, "upload", upload_args(0, content, CHUNK, sha256="0" * 64), content[CHUNK:])
    exchange(rig, "upload", upload_args(0, content, CHUNK), content[CHUNK:])
    args = {"filename": "f", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(ConfigError, match=r"not JSON|longer"):
        exchange(rig, "submit", args | {"upload": f"{0:032x}"})
    thread.join(30)
    assert jobs and jobs[0].data["rows"] == 1


def test_uploads_go_on_after_a_restart_for_an_hour(own):
    rig = own(peers=False)
    rig.client.status()
    content = json.dumps({"prompt": "a", "completion": "b", "note": "x" * CHUNK}).encode()
    for number in (5, 6, 7):
        assert exchange(rig, "upload", upload_args(number, content), content[:CHUNK]) == {"offset": CHUNK}
    exchange(rig, "upload", upload_args(6, content, CHUNK), content[CHUNK:])
    (rig.run_dir / f".upload-{8:032x}").mkdir()  # of a crash in its first moment
    old = rig.run_dir / f".upload-{7:032x}" / "data"
    rig.service.kill()
    os.utime(old, (time.time() - 3700,) * 2)  # stamp: as if an hour ago
    rig.service.start()
    rig.client.status()
    assert sorted(left_behind(rig.run_dir)) == [f".upload-{n:032x}" for n in (5, 6)]
    assert exchange(rig, "upload", upload_args(5, content), content[:CHUNK]) == {"offset": CHUNK}
    rest = exchange(rig, "upload", upload_args(5, content, CHUNK), content[CHUNK:])
    assert rest == {"offset": len(content)}
    args = {"filename": "f", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for number in (5, 6):
        assert exchange(rig, "submit", args | {"upload": f"{number:032x}"})["data"]["rows"] == 1
    with pytest.raises(HarliError, match="begin again"):
        exchange(rig, "upload", upload_args(7, content, CHUNK), content[CHUNK:])
    assert left_behind(rig.run_dir) == []


def test_an_upload_that_was_damaged_before_a_restart_is_refused(own):
    rig = own(peers=False)
    rig.client.status()
    content = b"x" * 100
    exchange(rig, "upload", upload_args(5, content), content)
    rig.service.kill()
    (rig.run_dir / f".upload-{5:032x}" / "data").write_bytes(b"y" * 100)
    rig.service.start()
    args = {"filename": "f", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(HarliError, match="its sha256 is"):
        exchange(rig, "submit", args | {"upload": f"{5:032x}"})
    until(lambda: not left_behind(rig.run_dir), "the upload's end")


def test_what_stands_still_is_removed(tmp_path, monkeypatch):
    import asyncio

    monkeypatch.setattr(uploads, "LIFE_S", 0.0)
    monkeypatch.setattr(uploads, "SWEEP_S", 0.01)

    async def run() -> None:
        kept = uploads.Uploads(tmp_path)
        sweeping = asyncio.create_task(kept.run())
        args = public.UploadArgs(**upload_args(6, b"abc"))
        assert (await kept.add(args, [b"ab"])).offset == 2
        end = time.monotonic() + 10
        while left_behind(tmp_path):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        args.offset = 2
        with pytest.raises(HarliError, match="begin again"):
            await kept.add(args, [b"c"])
        sweeping.cancel()
        kept.close()

    asyncio.run(run())


def test_a_file_that_shrinks_while_it_is_read_is_named(rig, tmp_path):
    from sglang_harli.client.data_source import DataSource

    path = write_large(tmp_path / "shrinks.jsonl", 2)
    with DataSource(path) as source:
        os.truncate(path, 100)
        with pytest.raises(DataError, match=r"shrinks\.jsonl has become shorter"):
            source.sha256()


def test_an_upload_that_its_submit_has_no_use_for_is_removed(rig, tmp_path):
    """Otherwise those of 16 such submits would keep every other file waiting."""
    large, other = (write_large(tmp_path / f"{mib}.jsonl", mib) for mib in (2, 3))
    job = rig.client.submit(large, idempotency_key="once")
    assert rig.client.submit(large, idempotency_key="once").id == job.id
    until(lambda: left_behind(rig.run_dir) == [], "the upload of a repeated submit being removed")
    with pytest.raises(ConfigError, match="belongs to"):
        rig.client.submit(other, idempotency_key="once")
    until(lambda: left_behind(rig.run_dir) == [], "the upload of a refused submit being removed")

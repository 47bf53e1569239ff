"""A large file over HTTP: the process that serves does not grow with it, and it makes the job that
it makes over ZMQ."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from sglang_harli import run_paths
from support.api_process import ApiProcess
from support.data_files import write_large
from support.service.service_fixture import ServiceUnderTest, until
from support.tokenizer import make_tokenizer_folder

pytestmark = pytest.mark.long

MIB = 1 << 20
LARGE_MIB = int(os.environ.get("HARLI_TEST_UPLOAD_MIB", "256"))  # 1024 for a gigabyte
MOST_MIB = 64  # that a process may grow by
LIMITS = {"max_file_size": "4GiB", "max_files_size": "8GiB"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceUnderTest]:
    rig = ServiceUnderTest(tmp_path, make_tokenizer_folder(tmp_path / "model"), peers=False, **LIMITS)
    yield rig
    rig.close()


@pytest.fixture
def server(service: ServiceUnderTest) -> Iterator[ApiProcess]:
    server = ApiProcess(run_paths.verbs_endpoint(str(service.run_dir)), **LIMITS)
    yield server
    server.stop()


@contextmanager
def bounded(**processes: int) -> Iterator[None]:
    """None of these processes, by id, grows by more than MOST_MIB meanwhile."""
    watched = {name: psutil.Process(pid) for name, pid in processes.items()}
    before = {name: process.memory_info().rss for name, process in watched.items()}
    most = dict(before)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for name, process in watched.items():
                most[name] = max(most[name], process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    grown = {name: (most[name] - before[name]) / MIB for name in watched}
    print(", ".join(f"{name} grew by {mib:.1f} MiB" for name, mib in grown.items()))
    assert max(grown.values()) < MOST_MIB, grown


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_large_file_over_http_and_over_zmq(
    service: ServiceUnderTest, server: ApiProcess, tmp_path: Path
) -> None:
    path = write_large(tmp_path / "large.jsonl", LARGE_MIB)
    whole = digest(path)
    assert service.service.process is not None
    watched = {"the HTTP process": server.pid, "the service": service.service.process.pid}
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=600) as client:
        client.files.delete(client.files.create(file=("a", b"x"), purpose="fine-tune").id)
        service.client.submit([{"prompt": "a", "completion": "b"}])  # all is loaded
        with bounded(**watched), path.open("rb") as opened:
            file = client.files.create(file=opened, purpose="fine-tune")
        assert (file.filename, file.bytes) == (path.name, path.stat().st_size)
        found, size = hashlib.sha256(), 0
        with bounded(**watched), client.files.with_streaming_response.content(file.id) as answer:
            for piece in answer.iter_bytes(MIB):
                found.update(piece)
                size += len(piece)
        assert (size, found.hexdigest()) == (file.bytes, whole)
        with bounded(**watched):
            asked = client.fine_tuning.jobs.create(model="org/tiny", training_file=file.id)
            until(
                lambda: client.fine_tuning.jobs.retrieve(asked.id).status == "queued", "the file's rows", 500
            )
        with bounded(**watched):
            sent = service.client.submit(path)
        job = service.client.get(asked.id)
        assert job.data == sent.data
        assert job.data["sha256"] == whole and job.data["rows"] == 4 * LARGE_MIB
        folders = [service.folder(one) / "data" for one in (job, sent)]
        first, second = (
            {path.name: digest(path) for path in folder.iterdir() if path.is_file()} for folder in folders
        )
        assert first == second and first["train.jsonl"] == whole
        client.files.delete(file.id)

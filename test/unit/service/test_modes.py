"""What the service writes is its user's alone, whatever the umask and in whatever run directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from support.other_user import UID, needs_root, run_python
from support.service.service_fixture import pairs, until
from support.service.service_process import ServiceProcess

OTHERS = 0o077


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    paths = [p for p in folder.rglob("*") if p.name != "service.log"]  # the tests' own
    return [str(p) for p in paths if p.lstat().st_mode & OTHERS and not p.is_symlink()]


def test_everything_of_a_job_is_closed_to_others_in_a_run_directory_that_is_not(tmp_path, own):
    (tmp_path / "runs").mkdir(mode=0o755)
    rig = own()
    job = rig.done(rig.client.submit(pairs(8), n_epochs=1))
    until(lambda: (rig.folder(job) / "metrics.jsonl").exists(), "the readable copies")
    rig.client.submit(b'{"prompt": "a", "completion": "b"}' + b" " * (3 << 20) + b"\n")  # an upload
    names = {p.name for p in (tmp_path / "runs").rglob("*")}
    assert {"harli.db", "ids.npy", "adapter_model.safetensors", "job.json", "state.safetensors"} <= names
    assert open_to_others(tmp_path / "runs") == []
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o755  # may be meant
    said = f"{tmp_path / 'runs'} is open to other users (mode 0755): they cannot read the jobs in it, but see their names"
    assert f"{said}: chmod 700" in rig.service.log.read_text()


def test_what_an_earlier_version_left_open_is_closed(tmp_path, own):
    rig = own()
    job = rig.done(rig.client.submit(pairs(8), n_epochs=1))
    rig.service.terminate()
    for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (tmp_path / "runs" / "mine.txt").write_text("not the service's")
    (tmp_path / "runs" / "ftjob-link").symlink_to(tmp_path / "runs" / "mine.txt")
    rig.service.start()
    assert rig.client.get(job.id).status == "succeeded"
    runs = tmp_path / "runs"
    for path in (runs / "harli.db", rig.folder(job)):
        assert not path.stat().st_mode & OTHERS, path
    assert stat.S_IMODE((runs / "mine.txt").stat().st_mode) == 0o666
    assert "but replace them: chmod 700" in rig.service.log.read_text()


def test_a_run_directory_that_is_made_is_private_and_says_nothing(tmp_path, model):
    service = ServiceProcess(str(model)).start()
    try:
        assert stat.S_IMODE(service.run_dir.stat().st_mode) == 0o700
        assert "is open to other users" not in service.log.read_text()
    finally:
        service.close()


@needs_root
def test_an_ipc_endpoint_is_open_to_the_servers_user_alone(model):
    service = ServiceProcess(str(model)).start()
    try:
        path = service.endpoint.removeprefix("ipc://")
        assert not os.stat(path).st_mode & OTHERS
        service.folder.chmod(0o755)
        done = run_python(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})")
        assert "PermissionError" in done.stderr
        with FinetuneClient(service.endpoint) as client:
            client.status()
    finally:
        service.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_another_users_folder_in_shared_memory_keeps_jobs_waiting_and_nothing_is_put_into_it(own):
    rig = own()
    shm = run_paths.shm_dir(str(rig.run_dir))
    shm.mkdir(mode=0o777)
    os.chown(shm, UID, -1)
    pid = rig.service.process.pid
    job = rig.client.submit(pairs(8), n_epochs=1)
    said = f"it belongs to uid {UID}: have it removed"
    held = until(
        lambda: (j := rig.client.get(job.id)).status == "queued" and said in (j.reason or "") and j, said
    )
    assert held.error is None and list(shm.iterdir()) == []
    shm.rmdir()
    rig.done(job)  # tried again by itself
    assert rig.service.alive and rig.service.process.pid == pid

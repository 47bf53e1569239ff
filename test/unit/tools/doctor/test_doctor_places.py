"""`harli doctor` on addresses, shared memory, run directories and job stores, whole and broken."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sqlite3
from pathlib import Path

import pytest

from sglang_harli.service.jobs.store import JobStore, sqlite_url
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.checks import job_store, ports, run_directory, shared_memory
from sglang_harli.tools.doctor.finding import Status
from support.service.job_records import record


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time: what a look must not change."""
    return {
        str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()
    }


# ------------------------------------------------------------------ ports
@pytest.fixture
def held() -> object:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_is_free_or_its_holder_is_named(held: int):
    taken = ports.http_port(Asked(port=held))
    assert taken.status is Status.PROBLEM
    assert f"pid {os.getpid()}" in taken.found and "another --port" in taken.mend
    endpoint = ports.finetune_endpoint(Asked(endpoint=f"tcp://127.0.0.1:{held}"))
    assert endpoint.status is Status.PROBLEM
    assert "another --harli-finetune-endpoint" in endpoint.mend
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    assert ports.http_port(Asked(port=free)).status is Status.OK
    assert ports.finetune_endpoint(Asked(endpoint=f"tcp://localhost:{free}")).status is Status.OK


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("/v/bin/python -m sglang_harli.launch_server --port 1", True),
        ("/v/bin/python -m x.child_process 1 sglang_harli.service.app", True),
        ("/v/bin/python /v/bin/sglang serve --model-path m", True),
        ("sglang::scheduler", True),
        ("/srv/sglang/bin/redis-server", False),
        ("python -m pytest test/sglang", False),
        ("", False),
    ],
)
def test_which_processes_are_a_servers(command: str, ours: bool):
    assert proc.Process(1, command).is_server is ours


def test_an_address_of_another_host_is_left_alone():
    elsewhere = "192.0.2.1"  # for documentation (RFC 5737)
    assert ports.http_port(Asked(http=f"http://{elsewhere}:30000")).status is Status.SKIPPED
    assert ports.finetune_endpoint(Asked(endpoint=f"tcp://{elsewhere}:30100")).status is Status.SKIPPED


def test_ipc_endpoints(tmp_path: Path):
    def look(path: Path | str) -> tuple[Status, str]:
        finding = ports.finetune_endpoint(Asked(endpoint=f"ipc://{path}"))
        return finding.status, finding.found

    short = Path(os.path.relpath(tmp_path))  # pytest's own paths may be too long for a socket
    path = min(tmp_path / "a.sock", short / "a.sock", key=lambda p: len(str(p)))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert look(path)[0] is Status.PROBLEM and f"pid {os.getpid()}" in look(path)[1]
    assert look(path)[0] is Status.OK, "of a server that is gone"
    assert path.exists(), "a look removes nothing"
    (tmp_path / "file").write_text("x")
    assert "a file or a folder of that name" in look(path.parent / "file")[1]
    assert "does not exist" in look(path.parent / "no" / "x")[1]
    assert "at most 107 bytes" in look("/" + "x" * 200)[1]


def test_ports_that_outgoing_connections_may_take():
    reserved = ports.parse_ranges("8080,40000-40010\n")
    assert reserved == [range(8080, 8081), range(40000, 40011)]
    assert ports.judge_range([30000, 40005], 32768, 60999, reserved).status is Status.OK
    within = ports.judge_range([30000, 50000], 32768, 60999, reserved)
    assert within.status is Status.WARNING and "port 50000" in within.found
    assert "below 32768" in within.mend
    assert ports.judge_range([1], 40000, 40100, []).status is Status.WARNING


# ------------------------------------------------------------------ shared memory
def test_shared_memory(tmp_path: Path):
    gone = shared_memory.judge(tmp_path / "none", 0, "own")
    assert gone.status is Status.PROBLEM and "--shm-size" in gone.mend
    own = f"harli-{os.getuid()}-mine"
    plain = shared_memory.judge(tmp_path, 0, own)
    assert plain.status is Status.OK or "in all" in plain.found
    assert shared_memory.judge(tmp_path, 1 << 60, own).status is Status.WARNING, "less than a job's state"
    (tmp_path / own).symlink_to(tmp_path)
    assert "is a link" in shared_memory.judge(tmp_path, 0, own).found


def test_what_dead_servers_left_is_named_and_stays(tmp_path: Path):
    left = tmp_path / f"harli-{os.getuid()}-{'0' * 16}"
    left.mkdir()
    (left / "slot-1").write_bytes(b"x" * 8192)
    before = tree(tmp_path)
    finding = shared_memory.judge(tmp_path, 0, "own")
    assert finding.status is Status.WARNING
    assert f"{left} holds 8.0 KiB" in finding.found and f"rm -r {left}" in finding.mend
    assert tree(tmp_path) == before


def test_what_a_living_server_has_is_no_leftover(tmp_path: Path):
    key = "1" * 16
    (tmp_path / f"harli-{os.getuid()}-{key}").mkdir()
    (tmp_path / f"harli-{os.getuid()}-{key}" / "slot-1").write_bytes(b"x" * 8192)
    with socket.socket(socket.AF_UNIX) as server:  # as the service's, whose folder has this form
        server.bind(f"\0/harli-{os.getuid()}/{key}/scheduler.sock")
        assert list(shared_memory.leftovers(tmp_path)) == []
    assert len(list(shared_memory.leftovers(tmp_path))) == 1


def test_the_largest_checkpoint_says_what_a_job_needs(tmp_path: Path):
    assert shared_memory.largest_state(tmp_path) == 0
    for step, size in ((1, 100), (2, 300)):
        folder = tmp_path / "ftjob-1" / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.safetensors").write_bytes(b"x" * size)
    assert shared_memory.largest_state(tmp_path) == 300


# ------------------------------------------------------------------ run directory
@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o700)
    return folder


def test_a_private_run_directory_is_well(run_dir: Path):
    finding = run_directory.judge_run_directory(run_dir)
    kind = proc.file_system(run_dir)
    expected = run_directory.judge_file_system(kind, run_dir).status if kind else Status.OK
    assert finding.status is expected, finding
    later = run_directory.judge_run_directory(run_dir / "later" / "deeper")
    assert "will be made" in later.found or later.status is expected
    assert list(run_dir.iterdir()) == []


def test_a_run_directory_open_to_others(run_dir: Path):
    (run_dir / "harli.db").touch(mode=0o644)
    run_dir.chmod(0o755)
    finding = run_directory.judge_run_directory(run_dir)
    assert finding.status is Status.WARNING
    assert "open to other users, and so are 1 things in it, such as harli.db" in finding.found
    assert f"chmod -R go= {run_dir}" in finding.mend
    assert run_dir.stat().st_mode & 0o777 == 0o755


def test_a_run_directory_that_is_a_file(tmp_path: Path):
    (tmp_path / "runs").write_text("x")
    finding = run_directory.judge_run_directory(tmp_path / "runs")
    assert finding.status is Status.PROBLEM and "--harli-run-dir" in finding.mend


def test_who_uses_a_run_directory(run_dir: Path):
    lock = run_dir / "lock"
    assert proc.lock_holder(lock) is None
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = proc.lock_holder(lock)
    assert holder is not None and holder.pid == os.getpid()


@pytest.mark.parametrize(
    ("kind", "status"),
    [("ext4", "ok"), ("xfs", "ok"), ("nfs4", "warning"), ("tmpfs", "warning"), ("overlay", "warning")],
)
def test_file_systems(kind: str, status: str):
    assert run_directory.judge_file_system(kind, Path("/runs")).status == status


@pytest.mark.parametrize(
    ("free", "state", "files", "status"),
    [
        (50 << 30, 0, None, "ok"),
        (50 << 30, 1 << 30, 10**6, "ok"),
        (2 << 30, 0, None, "warning"),
        (1 << 20, 0, None, "problem"),
        (2 << 30, 1 << 31, None, "problem"),
        (50 << 30, 0, 3, "problem"),
    ],
)
def test_room_on_the_disk(free: int, state: int, files: int | None, status: str):
    assert run_directory.judge_disk(Path("/runs"), free, state, files).status == status


def test_the_folder_of_the_sockets(tmp_path: Path):
    place = tmp_path / "h" / "key"
    if len(f"{place}/scheduler.sock") > 107:
        pytest.skip("the temporary folder's path is too long for a socket")
    assert run_directory.judge_sockets(place).status is Status.OK
    place.mkdir(parents=True)
    place.parent.chmod(0o700)
    place.chmod(0o755)
    assert run_directory.judge_sockets(place).status is Status.WARNING
    place.chmod(0o700)
    assert run_directory.judge_sockets(place).status is Status.OK
    place.rmdir()
    place.symlink_to(tmp_path)
    assert run_directory.judge_sockets(place).status is Status.PROBLEM
    assert "TMPDIR" in run_directory.judge_sockets(Path("/" + "x" * 120)).mend


# ------------------------------------------------------------------ job store
@pytest.fixture
def store(run_dir: Path) -> Path:
    path = run_dir / "harli.db"
    made = JobStore(sqlite_url(path))
    made.write([record(), record(id="ftjob-1", number=2)])
    made.close()
    return path


def sql(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_a_whole_store_is_read_and_left_as_it_is(store: Path):
    before = tree(store.parent)
    finding = job_store.judge(store, in_use=False)
    assert (finding.status, finding.mend) == (Status.OK, "")
    assert "2 queued" in finding.found
    assert tree(store.parent) == before


def test_a_store_that_a_server_has_open(run_dir: Path):
    path = run_dir / "harli.db"
    server = JobStore(sqlite_url(path))
    server.write([record()])
    assert job_store.judge(path, in_use=True).status is Status.OK
    server.write([record(id="ftjob-1", number=2)])
    assert "2 queued" in job_store.judge(path, in_use=True).found, "what is in the log counts"
    server.close()


def test_a_store_whose_server_was_killed(store: Path, tmp_path: Path):
    """What is only in the log is read, and the log stays."""
    server = JobStore(sqlite_url(store))
    server.write([record(id="ftjob-2", number=3)])
    left = tmp_path / "left"
    left.mkdir()
    for path in store.parent.glob("harli.db*"):
        shutil.copy(path, left)
    server.close()
    before = {name: size for name, (size, _) in tree(left).items()}
    finding = job_store.judge(left / "harli.db", in_use=False)
    assert finding.status is Status.OK and "3 queued" in finding.found
    assert {name: size for name, (size, _) in tree(left).items()} == before
    (left / "harli.db-shm").unlink()  # a process that reads the log makes it again
    assert "3 queued" in job_store.judge(left / "harli.db", in_use=False).found


def test_stores_that_cannot_be_used(store: Path, tmp_path: Path):
    assert job_store.judge(tmp_path / "none.db", in_use=False).status is Status.SKIPPED
    sql(store, "UPDATE settings SET value = '7' WHERE key = 'schema'")
    other = job_store.judge(store, in_use=False)
    assert other.status is Status.PROBLEM and "has schema 7, this harli reads 2" in other.found
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database" * 100)
    assert job_store.judge(garbage, in_use=False).status is Status.PROBLEM
    foreign = tmp_path / "foreign.db"
    sql(foreign, "CREATE TABLE jobs (id TEXT)")
    assert "not a job store" in job_store.judge(foreign, in_use=False).found


def test_jobs_that_cannot_be_read(store: Path):
    sql(store, "UPDATE jobs SET body = '{}' WHERE id = ?", "ftjob-1")
    finding = job_store.judge(store, in_use=False)
    assert finding.status is Status.WARNING
    assert "1 of 2 jobs cannot be read" in finding.found and "ftjob-1" in finding.found


def test_files_that_cannot_be_read(store: Path):
    sql(store, "INSERT INTO objects (id, kind, body) VALUES ('file-1', 'file', '{}')")
    finding = job_store.judge(store, in_use=False)
    assert finding.status is Status.WARNING
    assert "1 of 1 files and uploads cannot be read" in finding.found and "file-1" in finding.found

"""The finetune service's supervision, with real child processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_harli import run_paths
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig
from sglang_harli.errors import StateError, UnsupportedError
from sglang_harli.managers.http.supervision import supervisor
from sglang_harli.managers.http.supervision.endpoint_check import check_endpoint_free
from sglang_harli.managers.http.supervision.supervisor import RestartPolicy, RunDirLock, Supervisor
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.sglang_versions import supported

QUICK = RestartPolicy(first_s=0.05, longest_s=0.2, healthy_s=60.0, limit=3)


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that a child can run with -m."""

    def write(body: str) -> str:
        (tmp_path / "harli_test_child.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "harli_test_child"

    return write


@pytest.fixture
def supervised() -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def make(module: str, environment: dict[str, str] | None = None, **policy: float) -> Supervisor:
        values = {"first_s": 0.05, "longest_s": 0.2, "limit": 3, **policy}
        made.append(Supervisor(module, environment or {}, policy=RestartPolicy(**values)))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop(grace_s=2)


LIVES = "import signal\nsignal.pause()\n"
HOLDER = """
import sys
from sglang_harli.managers.http.supervision.supervisor import RunDirLock
lock = RunDirLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


# ------------------------------------------------------------------ lock
def test_second_server_on_a_run_dir_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "runs")
    command = [sys.executable, "-c", HOLDER, run_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateError, match=rf"in use by the server with pid {holder.pid}\b"):
            RunDirLock(run_dir)
        holder.kill()
    lock = RunDirLock(run_dir)  # what a killed server left behind refuses nobody
    assert Path(lock.path).read_text() == f"{os.getpid()}\n"
    lock.release()


def test_lock_names_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedError, match=r"--harli-run-dir .*file/runs.*can be written"):
        RunDirLock(str(tmp_path / "file" / "runs"))


# ------------------------------------------------------------------ endpoint
def test_endpoint_in_use_is_refused_and_free_ones_pass(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StateError, match=f"{endpoint}: .*in use; give another"):
            check_endpoint_free(endpoint, grace_s=0.2)
    check_endpoint_free(endpoint)
    check_endpoint_free(f"ipc://{tmp_path}/endpoint")
    assert not (tmp_path / "endpoint").exists()
    for name in ("localhost", socket.gethostname(), "lo", "*", "[::1]"):  # what the service can bind passes
        check_endpoint_free(f"tcp://{name}:{endpoint.rsplit(':', 1)[1]}")


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:30100", "tcp://host.invalid:30100"])
def test_an_address_of_another_host_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(
        StateError, match=f"{endpoint}: it is not an address of this host; give another tcp://"
    ):
        check_endpoint_free(endpoint, grace_s=60.0)


def test_a_socket_that_somebody_listens_at_is_in_use_and_one_left_behind_is_not(tmp_path: Path) -> None:
    path = tmp_path / "endpoint"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with pytest.raises(StateError, match="Address already in use; give another ipc://PATH"):
            check_endpoint_free(f"ipc://{path}", grace_s=0.2)
    assert path.exists()
    check_endpoint_free(f"ipc://{path}")


def test_a_file_in_the_place_of_a_socket_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("precious")
    with pytest.raises(StateError, match="there is a file or a folder of that name"):
        check_endpoint_free(f"ipc://{path}", grace_s=60.0)
    assert path.read_text() == "precious"
    with pytest.raises(StateError, match="its folder does not exist"):
        check_endpoint_free(f"ipc://{tmp_path}/missing/endpoint", grace_s=60.0)


# ------------------------------------------------------------------ restarts
def test_child_is_restarted_when_it_is_killed(child_module, supervised) -> None:
    keeper = supervised(child_module(LIVES))
    wait_until(lambda: keeper.pid)
    first = keeper.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: keeper.pid not in (None, first))
    assert keeper.starts == 2
    assert keeper.gave_up is None


def test_child_that_keeps_dying_is_given_up(child_module, supervised, caplog) -> None:
    keeper = supervised(child_module("raise SystemExit(3)\n"))
    with caplog.at_level(logging.WARNING, logger=supervisor.__name__):
        wait_until(lambda: keeper.gave_up)
    assert keeper.starts == 3
    assert "3 times in a row, the last time with exit code 3" in keeper.gave_up
    assert "serving goes on without finetuning" in caplog.text
    assert keeper.pid is None


def test_deaths_after_a_healthy_life_do_not_add_up(child_module, supervised) -> None:
    keeper = supervised(child_module("raise SystemExit(3)\n"), healthy_s=0.0)
    wait_until(lambda: keeper.starts > 4)
    assert keeper.gave_up is None


@pytest.mark.parametrize(
    ("deaths", "delay_s"), [(1, 0.5), (2, 1.0), (5, 8.0), (7, 30.0), (8, None), (9, None)]
)
def test_back_off_doubles_up_to_its_longest_and_then_gives_up(deaths: int, delay_s: float | None) -> None:
    assert RestartPolicy().delay_s(deaths) == delay_s


# ------------------------------------------------------------------ ends
def test_stop_ends_the_child_and_starts_no_other(child_module, supervised) -> None:
    keeper = supervised(child_module(LIVES))
    wait_until(lambda: keeper.pid)
    pid = keeper.pid
    keeper.stop()
    assert not is_alive(pid)
    assert keeper.starts == 1
    assert keeper.pid is None


def test_stop_kills_a_child_that_ignores_sigterm(child_module, supervised, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    body = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen({str(ready)!r}, 'w')\n"
    keeper = supervised(child_module(body + "while True: signal.pause()\n"))
    wait_until(ready.exists)
    pid = keeper.pid
    keeper.stop(grace_s=0.2)
    assert not is_alive(pid)


SERVER = """
import signal, sys
from sglang_harli.managers.http.supervision.supervisor import Supervisor
keeper = Supervisor("harli_test_child", {})
keeper.start()
while keeper.pid is None:
    pass
print(keeper.pid, flush=True)
signal.pause()
"""


def test_child_dies_with_a_killed_server(child_module, tmp_path: Path) -> None:
    up = tmp_path / "up"
    child_module(f"open({str(up)!r}, 'w')\n" + LIVES)
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        wait_until(up.exists)
        server.kill()
    wait_until(lambda: not is_alive(pid))


def test_child_whose_server_is_gone_already_does_not_run(child_module, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    module = child_module(f"open({str(ran)!r}, 'w')\n")
    command = [sys.executable, "-m", "sglang_harli.managers.http.supervision.child_process", "1", module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ended before its child was up" in done.stderr
    assert not ran.exists()


# ------------------------------------------------------------------ of a server
TOKENIZER_FLAGS = {
    "revision": "v2",
    "tokenizer_mode": "slow",
    "chat_template": "other.jinja",
    "hf_chat_template_name": "tool_use",
    "default_chat_template_kwargs": {"enable_thinking": False},
    "context_length": 512,
}


def server_args(run_dir: Path, **options: object) -> tuple[HarliOptions, SimpleNamespace]:
    """Our options and SGLang's arguments."""
    values = {"run_dir": str(run_dir), "finetune_endpoint": f"ipc://{run_dir}/endpoint", **options}
    args = SimpleNamespace(
        model_path="/models/small",
        tokenizer_path=None,
        served_model_name=None,
        trust_remote_code=False,
        node_rank=0,
        **TOKENIZER_FLAGS,
    )
    return HarliOptions(**values), args  # type: ignore[arg-type]


def test_start_gives_the_service_its_configuration_and_no_device(
    child_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    body = f"""import os
names = ('CUDA_VISIBLE_DEVICES', {supported.VERSION_ENV!r})
open({str(told)!r}, 'w').write(os.environ[{SERVICE_ENV!r}] + chr(10) + repr([os.environ[name] for name in names]))
import signal; signal.pause()
"""
    monkeypatch.setattr(supervisor, "SERVICE_MODULE", child_module(body))
    monkeypatch.chdir(tmp_path)
    supervisor.start(*server_args(Path("runs"), tpot_slo_ms=40.0))
    try:
        wait_until(lambda: told.exists() and told.read_text().count("\n") == 1)
        config, others = told.read_text().split("\n")
        assert others == repr(["", supported.installed()])
        told_config = ServiceConfig.from_json(config)
        assert told_config.options.run_dir == str(tmp_path / "runs")
        assert told_config.options.tpot_slo_ms == 40.0
        assert told_config.model_path == told_config.tokenizer_path == told_config.served_model_name
        with pytest.raises(
            SystemExit, match=rf"sglang-harli: .*in use by the server with pid {os.getpid()}\b"
        ):
            supervisor.start(*server_args(tmp_path / "runs"))
        keeper = supervisor.running()
        assert keeper is not None
        pid = keeper.pid
    finally:
        supervisor.stop()
    assert supervisor.running() is None
    assert pid is not None
    assert not is_alive(pid)
    RunDirLock(str(tmp_path / "runs")).release()


def test_the_slots_of_a_run_go_when_the_server_ends_and_before_the_next_one_starts(
    child_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SERVICE_MODULE", child_module(LIVES))
    (tmp_path / "runs").mkdir()
    folder = run_paths.shm_dir(str(tmp_path / "runs"))
    killed = SharedBuffer.create(folder, 4096)  # what a killed server left behind
    supervisor.start(*server_args(tmp_path / "runs"))
    try:
        assert not Path(killed.path).exists()
        held = SharedBuffer.create(folder, 4096)
        with pytest.raises(SystemExit, match="in use by the server with pid"):  # and takes nothing away
            supervisor.start(*server_args(tmp_path / "runs"))
        assert Path(held.path).exists()
    finally:
        supervisor.stop()
    assert not folder.exists()


@pytest.mark.parametrize("told", [True, False])
def test_the_service_ends_before_sglang_kills_its_processes(
    child_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """With the time that it needs where the server was told to end, at once where a process of it
    has crashed."""
    up, settled = tmp_path / "up", tmp_path / "settled"
    body = f"""
import signal, sys, time
def settle(*_):
    time.sleep(0.5)
    open({str(settled)!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, settle)
open({str(up)!r}, "w").close()
while True: signal.pause()
"""
    monkeypatch.setattr(supervisor, "SERVICE_MODULE", child_module(body))
    monkeypatch.setattr(supervisor, "_graceful", False)
    supervisor.start(*server_args(tmp_path / "runs"))
    wait_until(up.exists)
    keeper = supervisor.running()
    assert keeper is not None and keeper.pid is not None
    held = SharedBuffer.create(run_paths.shm_dir(str(tmp_path / "runs")), 4096)
    pid = keeper.pid
    if told:
        supervisor.graceful_end()
    supervisor.stop_with_tree(pid)  # another process's
    assert is_alive(pid) and supervisor.running() is keeper
    supervisor.stop_with_tree(os.getpid(), include_parent=True)
    assert not is_alive(pid) and settled.exists() == told
    assert not Path(held.path).exists() and supervisor.running() is None
    supervisor.stop_with_tree(None)


def test_without_a_folder_for_sockets_serving_goes_on_without_the_service(
    child_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "SERVICE_MODULE", child_module(LIVES))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run_paths, "ipc_dir", lambda run_dir: tmp_path / "file" / "key")
    supervisor.start(*server_args(tmp_path / "runs"))
    try:
        keeper = supervisor.running()
        assert keeper is not None and keeper.starts == 0 and keeper.pid is None
        assert keeper.gave_up is not None
        assert "no folder for the sockets of the finetune service" in keeper.gave_up
        assert "serving goes on without finetuning" in caplog.text
    finally:
        supervisor.stop()


def test_start_does_nothing_when_finetuning_is_off(tmp_path: Path) -> None:
    supervisor.start(*server_args(tmp_path / "runs", finetune="off"))
    assert supervisor.running() is None
    assert not (tmp_path / "runs").exists()

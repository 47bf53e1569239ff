"""Real servers for tests and benchmarks: started on free loopback ports, polled until ready,
stopped whole.

with start_server(model_path, "--harli-tpot-slo-ms", "25") as server:
    requests.post(f"{server.url}/generate", json=...)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sglang_harli.platforms.cpu import engine
from sglang_harli.run_paths import shm_dir

START_S = 300.0  # start-up takes 14 to 51 s on 2 cores that do nothing else
STOP_S = 40.0  # SGLang drains for at most 15 s, then kills its tree
POLL_S = 0.25

# What the launcher chooses on a CPU (platforms/cpu/defaults.py), spelled out for a plain server.
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--max-running-requests": "32",
    "--max-total-tokens": "131072",
    "--mem-fraction-static": "0.88",
    "--disable-overlap-schedule": None,
}
# The LoRA serving that the launcher enables there.
LORA_FLAGS = (
    *("--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", "32", "--lora-target-modules"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running server and everything that it started.

    Attributes:
        url: of the HTTP port.
        endpoint: of the finetune service (for a plain server: where it would be).
        run_dir: of its jobs.
        log_path: stdout and stderr of all its processes.
    """

    port: int
    endpoint: str
    run_dir: Path
    log_path: Path
    process: subprocess.Popen[bytes]
    started_at: float
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _family: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # ---- up
    def wait_ready(self, timeout: float = START_S) -> float:
        """Wait until ``/health_generate`` answers 200; seconds since the start.

        Raises:
            RuntimeError: the server ended, or was not ready in time; with the end of its log.
        """
        while time.monotonic() < self.started_at + timeout:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log_tail()}")
            if self.healthy():
                self.family()
                return time.monotonic() - self.started_at
            time.sleep(POLL_S)
        raise RuntimeError(f"the server was not ready within {timeout:g} s:\n{self.log_tail()}")

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=20) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):  # URLError is an OSError
            return False

    def wait_exit(self, timeout: float = START_S) -> int:
        """Wait for the server to end by itself; its exit status.

        Raises:
            subprocess.TimeoutExpired: it did not.
        """
        while time.monotonic() < self.started_at + timeout and self.process.poll() is None:
            self.family()
            time.sleep(POLL_S)
        return self.process.wait(0)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(line[:500] for line in self.log().splitlines()[-lines:])

    # ---- its processes
    def family(self) -> list[psutil.Process]:
        """The live processes: the server's and those that it started, the ones seen earlier
        included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for process in (root, *root.children(recursive=True)):
                self._family[process.pid] = process
        return [process for process in self._family.values() if _alive(process)]

    def find(self, text: str) -> psutil.Process:
        """The one process whose command line (or title) holds ``text``, such as
        ``sglang::scheduler``.

        Raises:
            LookupError: none or several.
        """
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if text in " ".join(process.cmdline()) else []
        if len(found) != 1:
            raise LookupError(f"{len(found)} processes of the server have {text!r} in their command line")
        return found[0]

    def pss_bytes(self) -> int:
        """Proportional set size of all its processes together, bytes."""
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    # ---- down
    def stop(self, timeout: float = STOP_S) -> None:
        """SIGTERM, wait, and make sure that no process of the server is left.

        Raises:
            AssertionError: some process outlived the server (it is killed then).
        """
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # a benchmark may hold it
            self.process.send_signal(signal.SIGTERM)
        self._reap(timeout, "SIGTERM")

    def kill(self) -> None:
        """SIGKILL every process of the server; nothing is asserted about those that it leaves."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(list(self._family.values()), timeout=10)
        self._clear_shared_memory()

    def _clear_shared_memory(self) -> None:
        """SGLang ends by SIGKILL, and the slots left behind are cleared at the run directory's next
        start: which a temporary one never sees."""
        shutil.rmtree(shm_dir(str(self.run_dir)), ignore_errors=True)

    def _reap(self, timeout: float, how: str) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self.family():
                self._clear_shared_memory()
                return
            self.family()
            time.sleep(POLL_S / 5)
        left = [f"{p.pid} {_command(p)}" for p in self.family()]
        self.kill()
        raise AssertionError(f"{timeout:g} s after {how} these are left: {left}; log:\n{self.log_tail()}")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.NoSuchProcess:
        return "gone"


def start_server(
    model_path: str | Path,
    *args: str,
    launcher: str = "harli",
    env: dict[str, str] | None = None,
    port: int | None = None,
    run_dir: str | Path | None = None,
    endpoint: str | None = None,
    device: str | None = "cpu",
) -> Server:
    """Start a server; it is not ready yet when this returns (``wait_ready``, or use it in
    ``with``).

    Args:
        args: more flags, as on a command line; they come before the defaults chosen here.
        launcher: ``harli``: our launcher; ``sglang``: ``python -m sglang.launch_server`` with the
            plugin and, on the CPU engine, the stand-in on PYTHONPATH; ``plain``: the same with no
            plugin at all, and on the CPU engine the launcher's defaults as explicit flags.
        env: variables on top of this process's own.
        run_dir, endpoint: of the finetune service (default: in a temporary folder; a free port).
        device: ``cpu`` for the same engine on every machine; None lets the launcher choose.
    """
    folder = tempfile.TemporaryDirectory(prefix="harli-server-", ignore_cleanup_errors=True)
    port = port or free_port()
    run_dir = Path(run_dir or Path(folder.name) / "runs")
    endpoint = endpoint or f"tcp://127.0.0.1:{free_port()}"
    flags: dict[str, str | None] = {
        "--model-path": str(model_path),
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    if launcher == "harli" or any(a.startswith("--harli-") for a in args):
        flags |= {"--harli-run-dir": str(run_dir), "--harli-finetune-endpoint": endpoint}
    if device is not None:
        plain = {**CPU_FLAGS, "--dtype": _dtype(model_path)}
        flags |= plain if launcher == "plain" and device == "cpu" else {"--device": device}
    given = {a.split("=")[0] for a in args if a.startswith("--")}
    command = [sys.executable, "-m", _MODULES[launcher], *args]
    for flag, value in flags.items():
        if flag not in given:
            command += [flag] if value is None else [flag, value]
    log_path = Path(folder.name) / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(launcher, device) | (env or {}),
            cwd=folder.name,
            start_new_session=True,  # a Ctrl-C at the tests is theirs to handle
        )
    return Server(port, endpoint, run_dir, log_path, process, time.monotonic(), folder)


_MODULES = {
    "harli": "sglang_harli.launch_server",
    "sglang": "sglang.launch_server",
    "plain": "sglang.launch_server",
}


def _dtype(model_path: str | Path) -> str:
    """The model's own dtype, which our launcher keeps on a CPU."""
    return str(json.loads((Path(model_path) / "config.json").read_text()).get("dtype") or "auto")


def _environment(launcher: str, device: str | None) -> dict[str, str]:
    left_out = ("HARLI_ON", "HARLI_ENDPOINT", engine.CPU_ENGINE_ENV, "SGLANG_PLUGINS")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment["PYTHONUNBUFFERED"] = "1"
    if launcher == "plain":
        environment["SGLANG_PLUGINS"] = "none"
    if launcher != "harli" and device == "cpu":
        engine.turn_on(environment, path=[])
    return environment

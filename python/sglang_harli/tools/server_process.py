"""A server started by the launcher as a process of its own, and stopped whole."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from sglang_harli.errors import HarliError

START_S = 300.0
STOP_S = 25.0  # SGLang drains for at most 15 s, then kills its tree
POLL_S = 0.25


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """``with ServerProcess(...) as server`` waits until it serves, and leaves no process behind.

    ``run_dir`` and ``endpoint`` are the finetune service's; ``log`` takes the output of all its
    processes; ``flags`` are further ones of the launcher; ``url`` is the HTTP port's.
    """

    def __init__(self, model: Path, run_dir: Path, log: Path, *flags: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.log = log
        self._family: dict[int, psutil.Process] = {}
        command = [sys.executable, "-m", "sglang_harli.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--harli-run-dir", str(run_dir)]
        command += ["--harli-finetune-endpoint", self.endpoint, *flags]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is answered here, by stopping it
            )

    def __enter__(self) -> ServerProcess:
        try:
            self._wait_ready()
        except BaseException:
            self.stop(patience_s=0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(patience_s=STOP_S if kind is None else 5.0)

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise HarliError(
                    f"the server ended with status {self._process.returncode}:\n{self.log_tail()}"
                )
            if self._healthy():
                return
            self._seen()
            time.sleep(POLL_S)
        raise HarliError(f"the server was not ready within {START_S:g} s:\n{self.log_tail()}")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=20) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(line[:300] for line in self.log.read_text(errors="replace").splitlines()[-lines:])

    def _seen(self) -> list[psutil.Process]:
        """Its live processes, those included whose parent is gone already."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                self._family[process.pid] = process
        self._process.poll()  # reaps the server itself
        return [process for process in self._family.values() if process.is_running()]

    def stop(self, patience_s: float = STOP_S) -> None:
        """SIGTERM, wait, then SIGKILL to whatever is left of its processes, by pid."""
        end = time.monotonic() + patience_s
        self._seen()
        if patience_s and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        while self._seen() and time.monotonic() < end:
            time.sleep(POLL_S)
        left = self._seen()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        self._process.wait(10)

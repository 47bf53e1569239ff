"""Where processes are killed: the service beside a bare host, and a whole real server.

Both keep one run directory and one endpoint through all deaths; what is killed is started again as
it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from sglang_harli import run_paths
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig
from sglang_harli.failpoints import FAULT_POINTS_ENV, Failpoint
from support.server import Server, start_server

VICTIMS = ("service", "scheduler", "all")
TEMPLATE_S = 120.0  # importing SGLang takes 10 s on a machine that does nothing else
HIT_S = 90.0
LOOK_S = 0.02


def until(found: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """What ``found`` returns, once it is true.

    Raises:
        TimeoutError: it did not become true.
    """
    end = time.monotonic() + timeout_s
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {timeout_s:g} s")
        time.sleep(LOOK_S)
    return value


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def gone(pid: int) -> None:
    until(lambda: not alive(pid), f"the end of process {pid}", 30)


class Faults:
    """The folder of named points that the processes of one rig look into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.env = {FAULT_POINTS_ENV: str(folder)}

    def arm(self, point: Failpoint, reach: int) -> None:
        """Stop the process that reaches ``point`` for the ``reach``-th time."""
        self.clear()
        temporary = self.folder / ".armed"
        temporary.write_text(f"stop {reach}")
        os.replace(temporary, self.folder / point)

    def hit(self, point: Failpoint) -> int:
        """Wait until somebody stands at the point; its pid."""
        armed, hit = self.folder / point, self.folder / f"{point}.hit"
        until(lambda: hit.exists() and not armed.exists(), f"the point {point}", HIT_S)
        return int(hit.read_text())

    def go(self, point: Failpoint) -> None:
        (self.folder / f"{point}.go").touch()

    def clear(self) -> None:
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)

    def processes(self) -> list[psutil.Process]:
        """The live processes that look into this folder."""
        return [p for p in psutil.process_iter() if self._looks(p) and alive(p.pid)]

    def _looks(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return process.environ().get(FAULT_POINTS_ENV) == str(self.folder)
        return False


class BareRig:
    """The real finetune service, started here, and a bare host.

    The scheduler's and the HTTP process's parts are one process here; killing it leaves the service
    alone, which a server does not (SGLang kills its whole tree).
    """

    kind = "bare"

    def __init__(self, model: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="harli-kill-"))
        self.run_dir = self.folder / "runs"
        self.run_dir.mkdir()
        self.endpoint = f"ipc://{self.folder}/public.sock"
        self.faults = Faults(self.folder / "faults")
        self.log = self.folder / "log"
        self._model = model
        self._options = HarliOptions(
            run_dir=str(self.run_dir), finetune_endpoint=self.endpoint, quantum_rows=1
        )
        self._template: subprocess.Popen[str] | None = None
        self._service: subprocess.Popen[bytes] | None = None
        self._host: int | None = None

    # ---- up
    def start(self) -> None:
        """Start whatever is not there."""
        if self._template is None:
            self._template = self._start_template()
        if self._service is None:
            self._service = self._start_service()
        if self._host is None:
            self._host = self._start_host()

    def _start_template(self) -> subprocess.Popen[str]:
        tests = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (tests, os.environ.get("PYTHONPATH")) if p)
        template = subprocess.Popen(
            [sys.executable, "-m", "support.bare_host"],
            env={**os.environ, **self.faults.env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
            bufsize=1,
        )
        self._answer(template)
        return template

    def _answer(self, template: subprocess.Popen[str]) -> dict[str, int]:
        assert template.stdout is not None
        ready, _, _ = select.select([template.stdout], [], [], TEMPLATE_S)
        line = template.stdout.readline() if ready else ""
        assert line, f"the template of hosts did not answer:\n{self.log_tail()}"
        return json.loads(line)

    def _start_service(self) -> subprocess.Popen[bytes]:
        config = ServiceConfig(
            options=self._options,
            model_path=self._model,
            tokenizer_path=self._model,
            served_model_name="org/tiny",
        )
        entry = [
            "sglang_harli.managers.http.supervision.child_process",
            str(os.getpid()),
            "sglang_harli.service.app",
        ]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *entry],
                env={**os.environ, **self.faults.env, SERVICE_ENV: config.to_json()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _start_host(self) -> int:
        assert self._template is not None and self._template.stdin is not None
        asked = {
            "options": asdict(self._options),
            "model": self._model,
            "log": str(self.log),
            "registrations": str(self._registrations),
        }
        self._template.stdin.write(json.dumps(asked) + "\n")
        return self._answer(self._template)["pid"]

    # ---- down
    def kill(self, victim: str) -> None:
        """SIGKILL; returns when the victim is gone."""
        if victim in ("service", "all") and self._service is not None:
            self._service.kill()
        if victim in ("scheduler", "all") and self._host is not None:
            os.kill(self._host, signal.SIGKILL)
            gone(self._host)
            self._host = None
        if victim in ("service", "all") and self._service is not None:
            self._service.wait(30)
            self._service = None

    def close(self) -> None:
        """End everything; what the processes left in files is removed."""
        self.kill("all")
        if self._template is not None:
            assert self._template.stdin is not None
            self._template.stdin.close()
            self._template.wait(30)
        for folder in (
            run_paths.shm_dir(str(self.run_dir)),
            run_paths.ipc_dir(str(self.run_dir)),
            self.folder,
        ):
            shutil.rmtree(folder, ignore_errors=True)

    # ---- what is seen from outside
    @property
    def _registrations(self) -> Path:
        return self.folder / "registrations"

    def registrations(self, name: str) -> list[str]:
        """The hosts (a word for each life) that made ``name`` answer, once per time."""
        if not self._registrations.exists():
            return []
        lines = (line.split() for line in self._registrations.read_text().splitlines())
        return [pid for pid, registered in lines if registered == name]

    def strays(self) -> list[str]:
        """Processes of this rig that should not be there."""
        own = {p.pid for p in (self._template, self._service) if p is not None} | {self._host}
        return [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in self.faults.processes() if p.pid not in own]

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class RealRig:
    """A server from our launcher; a killed scheduler takes the whole tree with it."""

    kind = "server"

    def __init__(self, model: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="harli-kill-"))
        self.run_dir = self.folder / "runs"
        self.faults = Faults(self.folder / "faults")
        self._model = model
        self._server: Server | None = None
        self._place: dict[str, Any] = {}
        self._logs: list[str] = []  # of the lives that are over

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def server(self) -> Server:
        assert self._server is not None
        return self._server

    def start(self) -> None:
        """Start the server if it is not there, by the same command as before; returns when it is
        healthy."""
        if self._server is not None:
            return
        flags = ("--harli-quantum-rows", "1", "--random-seed", "7")
        self._server = start_server(
            self._model, *flags, env=self.faults.env, run_dir=self.run_dir, **self._place
        )
        self._place = {"port": self._server.port, "endpoint": self._server.endpoint}
        self._server.wait_ready()

    def kill(self, victim: str) -> None:
        """SIGKILL; returns when the victim, and what goes with it, is gone."""
        server = self.server
        family = server.family()
        if victim == "service":
            [service] = [p for p in family if "sglang_harli.service.app" in " ".join(p.cmdline())]
            service.kill()
            gone(service.pid)
            return
        if victim == "scheduler":
            server.find("sglang::scheduler").kill()
        else:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        server.process.wait(60)  # SGLang ends its tree by itself
        for process in family:
            gone(process.pid)
        self._logs.append(server.log())
        self._server = None

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
        for folder in (run_paths.shm_dir(str(self.run_dir)), self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def registrations(self, name: str) -> list[str]:
        logs = [*self._logs, *([self._server.log()] if self._server else [])]
        said = f"adapter {name} is served"
        return [f"life {life}" for life, log in enumerate(logs) for _ in range(log.count(said))]

    def strays(self) -> list[str]:
        own = {p.pid for p in self.server.family()}
        return [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in self.faults.processes() if p.pid not in own]

    def log_tail(self, lines: int = 60) -> str:
        return self.server.log_tail(lines) if self._server is not None else self._logs[-1][-6000:]


Rig = BareRig | RealRig

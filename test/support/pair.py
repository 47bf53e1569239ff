"""A real prefill/decode pair on loopback: a prefill server, a decode server, and SGLang's router
before them, KV over mooncake's TCP transport.

with Pair(model) as pair:
    post(pair.url, "/generate", ...)
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sglang_harli import run_paths
from sglang_harli.platforms.cpu import defaults
from sglang_harli.sglang_versions import supported
from support.server import POLL_S, START_S, Server, free_port, start_server

TRANSPORT = "mooncake_tcp"
# SGLang takes the address under which a server's KV is reached from the first network interface
# otherwise.
LOOPBACK = {"SGLANG_HOST_IP": "127.0.0.1"}
PREFILL, DECODE = "prefill", "decode"
INSTALLED_BY = "`make install` installs it, or `pip install 'sglang-harli[disaggregation]'`"
LIBRARIES = "apt-get install libibverbs1 libnuma1 libcurl4"


@functools.cache
def missing() -> str | None:
    """Why no pair can run here, and what to install; None: one can."""
    for module, package in (
        ("mooncake", "mooncake-transfer-engine-non-cuda"),
        ("sglang_router", "sglang-router"),
    ):
        if not _runs(f"import {module}")[0]:
            return f"{package} is not installed: {INSTALLED_BY}"
    loads, why = _runs("import mooncake.engine")
    if not loads:
        return f"mooncake's transfer engine does not load ({why}): {LIBRARIES}"
    return None


def _runs(code: str) -> tuple[bool, str]:
    """Whether Python runs it, in a process of its own, and the last line of what it says."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0, (done.stderr.strip().splitlines() or [""])[-1]


@dataclass(frozen=True)
class Side:
    """How one server of the pair is started: as ``start_server`` takes it."""

    flags: tuple[str, ...] = ()
    launcher: str = "harli"
    env: tuple[tuple[str, str], ...] = ()


class Router(Server):
    """SGLang's router, of which every server is up already."""

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readiness", timeout=20) as answer:
                return answer.status == 200
        except OSError:
            return False


class Pair:
    """Both servers and the router; each keeps its ports and its run directory through restarts.

    Args:
        model: the model's folder.
        prefill, decode: how each is started; ours without finetuning and ours with it by default.
        mini: SGLang's small balancer for debugging in the router's place.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prefill: Side | None = None,
        decode: Side | None = None,
        mini: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="harli-pair-"))
        self._model, self._mini = model, mini
        self._sides = {
            PREFILL: prefill or Side(("--harli-finetune", "off")),
            DECODE: decode or Side(),
        }
        self.bootstrap_port = free_port()
        self._ports = {PREFILL: free_port(), DECODE: free_port(), "router": free_port()}
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.servers: dict[str, Server] = {}
        self.logs: dict[str, list[str]] = {PREFILL: [], DECODE: []}  # of the lives that are over

    # ---- what is asked
    @property
    def url(self) -> str:
        """Where requests go: the router."""
        return self.servers["router"].url

    @property
    def prefill(self) -> Server:
        return self.servers[PREFILL]

    @property
    def decode(self) -> Server:
        return self.servers[DECODE]

    def url_of(self, side: str) -> str:
        """Of one server, running or not."""
        return f"http://127.0.0.1:{self._ports[side]}"

    @property
    def run_dir(self) -> Path:
        """Of the decode server's jobs."""
        return self.folder / "runs"

    # ---- up
    def __enter__(self) -> Pair:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            self.print_logs()
        self.close()

    def start(self) -> None:
        """Start whatever is not there; returns when all of it serves."""
        started = [side for side in (PREFILL, DECODE) if side not in self.servers]
        for side in started:
            self.launch(side)
        with ThreadPoolExecutor(2) as threads:  # they share the cores: none waits for the other
            list(threads.map(lambda side: self.servers[side].wait_ready(2 * START_S), started))
        if "router" not in self.servers:
            self.servers["router"] = self._start_router()
            self.servers["router"].wait_ready()

    def launch(self, side: str) -> Server:
        """Start one server by its command; it is not ready yet when this returns."""
        how = self._sides[side]
        flags = [*how.flags, "--disaggregation-mode", side, "--disaggregation-transfer-backend", TRANSPORT]
        if side == PREFILL:
            # It shares this machine's cores, and would take one whole while it has nothing to do.
            flags += ["--disaggregation-bootstrap-port", str(self.bootstrap_port), "--sleep-on-idle"]
        elif how.launcher == "harli":
            flags += ["--harli-prefill-url", self.url_of(PREFILL)]
        else:  # our launcher's default on a CPU, spelled out
            for name, value, _ in supported.only("newest", defaults.DECODE_SERVER):
                flags += ["--" + name.replace("_", "-"), value]
        self.servers[side] = start_server(
            self._model,
            *flags,
            launcher=how.launcher,
            env=LOOPBACK | dict(how.env),
            port=self._ports[side],
            run_dir=self.run_dir if side == DECODE else self.folder / "prefill-runs",
            endpoint=self.endpoint if side == DECODE else None,
        )
        return self.servers[side]

    def _start_router(self) -> Server:
        port, log_path = self._ports["router"], self.folder / "router.log"
        command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
        command += ["--prefill", self.url_of(PREFILL), str(self.bootstrap_port)]
        command += ["--decode", self.url_of(DECODE), "--host", "127.0.0.1", "--port", str(port)]
        command += (
            ["--mini-lb"] if self._mini else ["--prometheus-port", str(free_port()), "--log-level", "warn"]
        )
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(os.environ),
                cwd=self.folder,
                start_new_session=True,
            )
        return Router(port, "", self.folder / "router", log_path, process, time.monotonic())

    # ---- down
    def kill(self, side: str) -> None:
        """SIGKILL every process of one server, by pid."""
        server = self.servers.pop(side)
        server.kill()
        self.logs[side].append(server.log())

    def restart(self, side: str) -> None:
        """Kill it, and start it again by the same command."""
        self.kill(side)
        self.start()

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        self.servers.clear()
        for folder in (run_paths.shm_dir(str(self.run_dir)), self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def print_logs(self, lines: int = 40) -> None:
        """The end of each log, into the output of a test that fails."""
        for name, server in self.servers.items():
            print(f"---- {name}\n{server.log_tail(lines)}")

    def until(self, found: Any, what: str, timeout_s: float = START_S) -> Any:
        """What ``found`` returns, once it is true; AssertionError with the logs: it did not become
        true."""
        end = time.monotonic() + timeout_s
        while not (value := found()):
            if time.monotonic() > end:
                self.print_logs()
                raise AssertionError(f"{what} did not come within {timeout_s:g} s")
            time.sleep(POLL_S)
        return value

    def family(self) -> list[psutil.Process]:
        """The live processes of all of it."""
        return [process for server in self.servers.values() for process in server.family()]

"""Servers for benchmarks: start ours and plain SGLang alike, hold one still, measure, end them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from sglang_harli.platforms.cpu import engine

HOST = "127.0.0.1"
START_LIMIT_S = 600.0
POLL_S = 0.05

# Arguments that decide what a server can hold and how it computes; None and False are SGLang's defaults.
LIMITS = (
    *("device", "dtype", "attention_backend", "sampling_backend", "mem_fraction_static", "max_total_tokens"),
    *("max_running_requests", "chunked_prefill_size", "context_length", "page_size", "disable_radix_cache"),
    *("disable_overlap_schedule", "disable_cuda_graph"),
)
LORA_LIMITS = ("enable_lora", "max_lora_rank", "lora_target_modules", "max_loras_per_batch", "lora_backend")

# A plugin for plain SGLang: on a CPU it cannot start with LoRA flags unless pin_memory is kept out of its
# LoRA layers.  The baseline gets that one patch and nothing else of ours.
BASELINE_PLUGIN = """
def activate():
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_harli.patches import catalog
    (patch,) = [p for p in catalog.ALL if "pin" in p.name]
    patch.register(HookRegistry)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """One server and the processes below it.

    Args:
        name: for messages and the log file.
        command: argv, the port included.
        port: its HTTP port.
        env: its whole environment.
        folder: where ``<name>.log`` is written and the server runs.
    """

    def __init__(self, name: str, command: list[str], port: int, env: dict[str, str], folder: Path) -> None:
        self.name = name
        self.command = command
        self.env = env
        self.url = f"http://{HOST}:{port}"
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0

    def start(self) -> float:
        """Seconds from the command to the first 200 of /health_generate.

        Raises:
            RuntimeError: it ended, or was not healthy in time; the message holds the log's end.
        """
        began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log_end()}")
            if time.monotonic() - began > START_LIMIT_S:
                self.stop()
                raise RuntimeError(
                    f"{self.name} was not healthy after {START_LIMIT_S:.0f} s:\n{self.log_end()}"
                )
            time.sleep(POLL_S)
        self.start_s = time.monotonic() - began
        return self.start_s

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30) as reply:
                return reply.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def log_end(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any], *, raw: bool = False, timeout_s: float = 300.0) -> Any:
        """POST JSON; the answer is JSON too, or with ``raw`` whatever bytes come."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return reply.read() if raw else json.load(reply)

    def processes(self) -> list[psutil.Process]:
        """The server's processes, the first one first."""
        if self.process is None:
            return []
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal_all(self, number: int) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def hold(self) -> None:
        """Stop every process of it: an idle scheduler spins on a core."""
        self.signal_all(signal.SIGSTOP)

    def release(self) -> None:
        self.signal_all(signal.SIGCONT)

    def pss_bytes(self) -> int:
        """Proportional set size of all its processes together."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to what is left of it after half a minute."""
        processes = self.processes()
        self.release()
        for process in processes[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)
        if self.process is not None:
            self.process.wait(timeout=10)


def base_environment() -> dict[str, str]:
    """This process's environment without settings of ours or of SGLang's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HARLI_", "SGLANG_"))}
    return {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **env}


def cpu_environment(**extra: str) -> dict[str, str]:
    """The same, on SGLang's CPU engine, with the stand-in for sgl_kernel in front."""
    env = base_environment()
    engine.turn_on(env, path=[])
    return {**env, **extra}


def ours(name: str, model: Path, folder: Path, flags: list[str] | None = None) -> Server:
    """A server of ours with its own defaults; ``folder`` takes its run directory."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_harli.launch_server", "--model-path", str(model)]
    command += ["--host", HOST, "--port", str(port), "--harli-run-dir", str(folder / f"{name}-runs")]
    command += ["--harli-finetune-endpoint", f"tcp://{HOST}:{free_port()}", *(flags or [])]
    return Server(name, command, port, base_environment(), folder)  # it finds its device by itself


def plain(name: str, model: Path, folder: Path, flags: list[str]) -> Server:
    """Plain SGLang, no plugin at all."""
    return _plain(name, model, folder, flags, cpu_environment(SGLANG_PLUGINS="none"))


def plain_with_lora(name: str, model: Path, folder: Path, flags: list[str]) -> Server:
    """Plain SGLang with LoRA flags: no plugin but the patch without which they do not start on a CPU."""
    site = folder / "baseline-site"
    metadata = site / "harli_bench_baseline-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (site / "harli_bench_baseline.py").write_text(BASELINE_PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-bench-baseline\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nbaseline = harli_bench_baseline:activate\n"
    )
    env = cpu_environment(SGLANG_PLUGINS="baseline")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(site)])
    return _plain(name, model, folder, flags, env)


def _plain(name: str, model: Path, folder: Path, flags: list[str], env: dict[str, str]) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    return Server(name, [*command, "--host", HOST, "--port", str(port), *flags], port, env, folder)


def limits_of(server: Server) -> dict[str, Any]:
    """What a running server resolved its limits to (``LIMITS`` and ``LORA_LIMITS``)."""
    info = server.get("/server_info")
    return {name: info.get(name) for name in (*LIMITS, *LORA_LIMITS, "max_total_num_tokens")}


def flags_for(limits: dict[str, Any], *, lora: bool) -> list[str]:
    """SGLang flags that give a plain server the same limits."""
    flags: list[str] = []
    for name in (*LIMITS, *(LORA_LIMITS if lora else ())):
        value = limits.get(name)
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags += [str(v) for v in (sorted(value) if isinstance(value, list | tuple | set) else [value])]
    return flags

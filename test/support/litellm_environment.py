"""LiteLLM in an environment of its own: its SDK's scripts, and its proxy before a server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from support.server import free_port

# The newest whose extra ``proxy`` can be installed: later ones want parts that are not published.
LITELLM = "litellm[proxy]==1.108.7"
INSTALL_S = 400.0
START_S = 200.0
MASTER_KEY = "sk-proxy"
# What is asked of other hosts otherwise.
LOCAL = (
    "LITELLM_LOCAL_MODEL_COST_MAP",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS",
    "LITELLM_LOCAL_AUTOROUTER_PRESETS",
    "LITELLM_LOCAL_BLOG_POSTS",
    "LITELLM_LOCAL_POLICY_TEMPLATES",
)


class NotInstalledError(Exception):
    """LiteLLM could not be installed; says why."""


def make_environment(folder: Path) -> Path:
    """The interpreter of a new environment, from the index that pip is set up with.

    Raises:
        NotInstalledError: there is no such index, or it lacks something.
    """
    python = folder / "bin" / "python"
    _run(
        [
            sys.executable,
            "-m",
            "uv",
            "venv",
            "--quiet",
            "--no-config",
            "--python",
            sys.executable,
            str(folder),
        ]
    )
    install = [
        "install",
        "--quiet",
        "--no-config",
        "--only-binary",
        ":all:",
        "--python",
        str(python),
        LITELLM,
    ]
    _run([sys.executable, "-m", "uv", "pip", *install])
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, env=_with_index(), capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"{' '.join(command[2:4])} took {INSTALL_S:g} s") from error
    if done.returncode:
        raise NotInstalledError(" ".join(done.stderr.split()) or "no reason")


def _with_index() -> dict[str, str]:
    """uv does not read pip's settings: it is handed pip's index, as in the Makefile."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if not any(name in env for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL")):
        asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        found = (
            env.get("PIP_INDEX_URL") or subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        )
        env |= {"UV_DEFAULT_INDEX": found} if found else {}
    return env


def run_environment() -> dict[str, str]:
    """The variables of a process of LiteLLM: it stays on this machine."""
    return os.environ | dict.fromkeys(LOCAL, "True")


@contextlib.contextmanager
def proxy(python: Path, config: str, folder: Path) -> Iterator[str]:
    """LiteLLM's proxy with a config in YAML: its URL."""
    port = free_port()
    (folder / "config.yaml").write_text(config)
    command = [str(python), "-I", str(python.parent / "litellm"), "--config", "config.yaml"]
    log_path = folder / "proxy.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=run_environment(),
            cwd=folder,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while not _alive(url):
            said = log_path.read_text(errors="replace")[-3000:]
            assert process.poll() is None and time.monotonic() < end, f"the proxy did not start:\n{said}"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/liveliness", timeout=20) as answer:
            return answer.status == 200
    except OSError:
        return False

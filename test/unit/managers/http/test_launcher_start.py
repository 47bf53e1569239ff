"""What the launcher knows at once it says at once: before torch or SGLang is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harli.managers.http.supervision.supervisor import RunDirLock


@pytest.fixture
def launch(tmp_path: Path):
    """``launch(*flags)``: the launcher's only line on stderr; an import of torch or sglang would be
    another."""
    for name in ("torch", "sglang"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sglang_harli.launch_server", "--port", "0", *flags],
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        return done.stderr.strip()

    return run


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"--harli-finetune-endpoint=ipc://{tmp_path}/s"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model-path", "m", "--served-model-name", "gpt-oss:120b"], "--served-model-name 'gpt-oss:120b'"),
        (["--model", "m", "--served-model-name=gpt-oss:120b"], "--served-model-name 'gpt-oss:120b'"),
        (["--model-path", "/models/gpt-oss:120b/"], "--model-path '/models/gpt-oss:120b/'"),
    ],
)
def test_a_name_with_a_colon_is_refused_with_one_that_works(launch, flags: list[str], said: str) -> None:
    reason = "holds a colon, which SGLang reads as base:adapter in a model's name"
    assert launch(*flags) == f"sglang-harli: {said} {reason}: give --served-model-name gpt-oss-120b"


def test_a_folder_that_is_not_there_is_named(launch) -> None:
    for path in ("/no/such/model", "./none", "../none"):
        assert launch("--model-path", path) == f"sglang-harli: --model-path {path!r}: there is no such folder"


def test_an_option_is_given_in_full(launch) -> None:
    said = launch("--model-path", "m", "--harli-tpot-slo", "30")
    assert said == "sglang-harli: --harli-tpot-slo is not an option: did you mean --harli-tpot-slo-ms"


def test_names_that_sglang_accepts_come_further(launch, endpoint: str) -> None:
    for flags in (["--model-path", "a:b", "--served-model-name", "ab"], ["--model-path", "s3://bucket/a"]):
        assert launch(*flags, endpoint) == "torch was imported"


def test_a_second_server_on_a_run_directory_is_refused(launch, tmp_path: Path, endpoint: str) -> None:
    lock = RunDirLock(str(tmp_path / "runs"))
    flags = ("--model-path", "m", "--harli-run-dir", "runs", endpoint)
    assert f"is in use by the server with pid {os.getpid()}: stop that server" in launch(*flags)
    assert launch(*flags, "--harli-finetune", "off") == "torch was imported"
    lock.release()
    assert launch(*flags) == "torch was imported"
    assert launch(*flags) == "torch was imported"  # the lock ends with its holder


def test_no_run_directory_is_made_before_the_rest_is_known(launch, tmp_path: Path, endpoint: str) -> None:
    assert launch("--model-path", "m", "--harli-run-dir", "runs", endpoint) == "torch was imported"
    assert not (tmp_path / "runs").exists()


def test_an_endpoint_that_cannot_be_bound_is_refused(launch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        said = launch("--model-path", "m", "--harli-finetune-endpoint", address)
    assert (
        said
        == f"sglang-harli: --harli-finetune-endpoint {address}: Address already in use; give another tcp://127.0.0.1:PORT"
    )
    said = launch("--model-path", "m", "--harli-finetune-endpoint", f"ipc://{'/x' * 60}")
    assert "at most 107 bytes behind ipc:// (this one has 120)" in said
    assert "Traceback" not in said


def test_an_http_port_where_another_process_listens_is_refused(launch, endpoint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = launch("--model-path", "m", "--port", port, endpoint)
        assert (
            launch("--model-path", "m", "--port", port, "--node-rank", "1", endpoint) == "torch was imported"
        )
    assert said == (
        f"sglang-harli: --port {port}: another process listens there: end it, or give another --port"
    )
    assert launch("--model-path", "m", "--port", port, endpoint) == "torch was imported"


def test_keys_that_cannot_be_used_are_refused(launch, endpoint: str) -> None:
    said = launch("--model-path", "m", "--harli-curve-keys", "none", endpoint)
    assert (
        said.startswith("sglang-harli: --harli-curve-keys: ") and "server.key_secret cannot be used" in said
    )

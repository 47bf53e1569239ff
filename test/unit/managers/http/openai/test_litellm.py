"""LiteLLM's SDK, unmodified and in an environment of its own, against the routes and the real
service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_harli import run_paths
from sglang_harli.managers.http.openai.access import Access
from support.api_server import ApiServer
from support.project_files import ROOT
from support.service.service_fixture import ServiceUnderTest, pairs
from support.tokenizer import make_tokenizer_folder

pytestmark = pytest.mark.long

LITELLM = "litellm==1.110.2"
SCRIPT = ROOT / "test" / "support" / "litellm_client.py"
MODEL = "org/tiny"
ROWS = "".join(json.dumps(row) + "\n" for row in pairs(8))


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with LiteLLM, from the index that pip is set up with."""
    folder = tmp_path_factory.mktemp("litellm") / "venv"
    python = folder / "bin" / "python"
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:", LITELLM],
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in commands:
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{LITELLM} could not be installed: {' '.join(command[1:4])} took 400 s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            pytest.skip(f"{LITELLM} could not be installed: {last}")
    return python


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("service")
    rig = ServiceUnderTest(folder, make_tokenizer_folder(folder / "model"), peers=False)
    server = ApiServer(run_paths.verbs_endpoint(str(rig.run_dir)), access=Access("secret")).start()
    yield server
    server.stop()
    rig.close()


def test_files_and_jobs_by_litellm(litellm: Path, server: ApiServer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # nothing is asked of another host
    command = [str(litellm), "-I", str(SCRIPT), server.base_url, "secret", str(path), MODEL]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    first = said["blocking"]
    assert (first["file"]["filename"], first["file"]["bytes"]) == (path.name, len(ROWS))
    assert first["files"] == [first["file"]["id"]] and first["content"] == ROWS and first["deleted"]
    created = first["created"]
    assert (created["status"], created["seed"], created["model"]) == ("validating_files", 7, MODEL)
    assert created["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert created["training_file"] == first["file"]["id"]
    assert first["retrieved"]["harli"]["suffix"] == "lite"
    for part in (first, said["asyncio"]):
        job = part["created"]["id"]
        assert part["retrieved"]["id"] == part["cancelled"]["id"] == job and part["listed"] == [job]
        assert part["cancelled"]["status"] == "cancelled" and part["cancelled"]["finished_at"]
    assert said["asyncio"]["created"]["hyperparameters"]["n_epochs"] == 3

    refused = said["refused"]
    assert refused["status"] == 400 and "there is no file 'file-none'" in refused["text"], refused

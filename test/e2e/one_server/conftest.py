"""The server that these tests share, on the run directory that version 0.1 left behind.

``test/fixtures/run_dir_0.1.tar.gz`` holds the run directory of a server that was killed (a job that
had succeeded, one that was paused, one in training, one in the queue), the model it served (32
wide, so that it can be kept) and ``expected.json``: what that version itself made of the same
folder, loss by loss and answer by answer.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.project_files import ROOT
from support.server import Server, start_server

ARCHIVE = ROOT / "test" / "fixtures" / "run_dir_0.1.tar.gz"
ADMIN_KEY = "secret"  # files and fine-tuning want it, chat does not
FLAGS = ("--random-seed", "11", "--harli-quantum-rows", "2", "--served-model-name", "tiny")


@pytest.fixture(scope="package")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("of_before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="package")
def expected(kept: Path) -> dict[str, Any]:
    return json.loads((kept / "expected.json").read_text())


@pytest.fixture(scope="package")
def server(kept: Path) -> Iterator[Server]:
    flags = (*FLAGS, "--admin-api-key", ADMIN_KEY)
    with start_server(kept / "tiny", *flags, run_dir=kept / "runs") as running:
        yield running


@pytest.fixture(scope="package")
def admin_key() -> str:
    return ADMIN_KEY

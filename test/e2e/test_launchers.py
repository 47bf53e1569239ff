"""The doors to a server: SGLang's own launcher with our options, and what happens when the seam is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from support.models import make_model
from support.server import free_port, start_server

SENTENCE = re.compile(r"^sglang-harli: .*$", re.MULTILINE)

# The launcher, in whose scheduler process the row that replaces the scheduler is lost.
WITHOUT_OUR_SCHEDULER = """
import sys
from sglang_harli import launch_server, plugin
if __name__ == "__mp_main__":  # SGLang's children run this file again
    plugin.TABLE = tuple(row for row in plugin.TABLE if row.main)
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def server_info(url: str) -> dict:
    with urllib.request.urlopen(f"{url}/server_info", timeout=30) as answer:
        return json.load(answer)


def test_sglangs_own_launcher_with_an_option_of_ours_serves_as_our_launcher_does(model):
    with start_server(model, "--harli-tpot-slo-ms", "25", launcher="sglang") as server:
        info = server_info(server.url)
        assert info["harli_tpot_slo_ms"] == 25.0
        assert info["enable_lora"] is True
        assert len(SENTENCE.findall(server.log())) == 0
        assert server.log().count("harli options: finetune='on', tpot_slo_ms=25.0") == 1
        assert (server.run_dir / "lock").read_text().strip() == str(server.pid)
        assert server.find("sglang_harli.service.app").is_running()


def test_a_server_that_the_seam_did_not_reach_stops_with_one_sentence(model, tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(WITHOUT_OUR_SCHEDULER)
    flags = ("--model-path", model, "--device", "cpu", "--port", str(free_port()), "--harli-run-dir", "runs")
    done = run(script, *flags, "--harli-finetune-endpoint", f"tcp://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert done.returncode == 1
    sentences = SENTENCE.findall(done.stderr)
    assert len(sentences) == 1, done.stderr[-3000:]
    assert "did not reach SGLang's scheduler (scheduler 0 runs without it)" in sentences[0]
    assert "--harli-finetune off" in sentences[0]


def run(script: Path, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, check=False)

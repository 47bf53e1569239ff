"""What happens when the seam is missing.  (SGLang's own launcher serves in
test_serving_features.py.)"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.models import make_model
from support.server import free_port

pytestmark = pytest.mark.long

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

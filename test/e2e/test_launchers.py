"""What happens when the seam is missing, and to a launcher that is killed while it starts.
(SGLang's own launcher serves in test_serving_features.py.)"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.ends import assert_all_end, new_mark
from support.models import make_model
from support.server import Server, free_port, start_server

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


def test_nothing_outlives_a_launcher_that_is_killed_while_it_starts(model: str) -> None:
    starting = start_server(model, env=new_mark())
    end = time.monotonic() + 120
    while not any("spawn_main" in " ".join(command) for command in commands(starting)):
        assert time.monotonic() < end, f"no child of SGLang's:\n{starting.log()}"
        time.sleep(0.05)
    # A child that is being spawned asks for its parent when it has imported SGLang: 12 s, a minute
    # on a busy machine.
    assert_all_end(starting, signal.SIGKILL, 240.0)
    starting.kill()


def commands(server: Server) -> list[list[str]]:
    found = []
    for process in server.family():
        with contextlib.suppress(psutil.Error):
            found.append(process.cmdline())
    return found

"""What a turn of SGLang's loop costs beside a server with nothing to train: calls, not time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sglang_harli
from sglang_harli.protocol import internal
from support.cuda.virtual_server import Prompt, Server, server
from support.trainer.co_trainer_host import temporary_run_dir, until

OURS = str(Path(sglang_harli.__file__).parent)
# In a turn that decodes: the hooks, the look at the socket, and every eighth batch measured.
MOST = 26


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Server]:
    for run_dir in temporary_run_dir(tmp_path):
        with server(run_dir) as found:
            found.peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
            until(found.host, found.peer, lambda: found.host.trainer.run is None)
            yield found


def calls_of(run: Any) -> Counter[str]:
    """Calls of our functions meanwhile, by name."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _value: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            found[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_a_turn_with_nothing_to_train_makes_few_calls(made: Server) -> None:
    quanta = len(made.quanta)  # before the run was stopped
    prompts = [Prompt(made.now_s + 0.01, 50, 400)]
    made.serve(prompts, 1.0)  # its prefill is over
    before = len(made.scheduler.batches)
    found = calls_of(lambda: made.serve([], 2.0))
    turns = len(made.scheduler.batches) - before
    assert turns > 150
    a_turn = {name: count / turns for name, count in found.items()}
    assert sum(a_turn.values()) <= MOST, sorted(a_turn.items(), key=lambda item: -item[1])
    assert len(made.quanta) == quanta

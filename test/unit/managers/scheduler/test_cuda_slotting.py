"""Quanta beside SGLang's real loop on a fake CUDA device: what stands before and behind a batch in
flight, how long a prompt waits, which stream is measured, and what a slow host makes late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli.config import HarliOptions
from support.cuda.virtual_server import Cost, Model, Prompt, Server, server
from support.trainer.co_trainer_host import temporary_run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def streams_of(made: Server, every_s: float, count: int, **each: int) -> list[Prompt]:
    return [Prompt(made.now_s + 0.1 + every_s * n, **each) for n in range(count)]


def behind_prefills(made: Server) -> int:
    """Quanta that were launched while a prefill's first tokens were to come."""
    return sum(
        q.behind is not None and not q.behind.batch.forward_mode.is_decode() for q in made.quanta
    )


def test_smoke(run_dir: str) -> None:
    with server(run_dir) as made:
        prompts = streams_of(made, 0.37, 12, tokens=1000, answer=60)
        made.serve(prompts, 6.0)
        print(len(made.quanta), behind_prefills(made), len(made.scheduler.batches), made.now_s)
        print(made.host.side.status())
        print([round(p.tpot_s * 1e3, 1) for p in prompts if p.token_s])
        from collections import Counter

        print(Counter((q.kind, q.tokens) for q in made.quanta))
        print(made.host.trainer.totals())
        assert 0

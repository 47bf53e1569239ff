"""Quanta in SGLang's own loops of a decode server, on a fake CUDA device in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.config import HarliOptions
from support.cuda.virtual_decode import decode_scheduler_class
from support.cuda.virtual_server import Model, Prompt, Server
from support.trainer.co_trainer_host import temporary_run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


@pytest.fixture(params=[True, False], ids=["overlap", "normal"])
def made(run_dir: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    options = HarliOptions(run_dir=run_dir, tpot_slo_ms=50.0, max_quantum_ms=40.0)
    server = Server(
        run_dir,
        model=Model(decode_s=0.010),
        overlap=request.param,
        options=options,
        made=decode_scheduler_class(),
        prefills=False,
    )
    yield server
    server.close()


def arriving(made: Server, every_s: float, count: int, answer: int = 40) -> list[Prompt]:
    return [Prompt(made.now_s + 0.1 + every_s * n, 100, answer) for n in range(count)]


def test_requests_keep_their_target_and_training_has_the_rest(made: Server) -> None:
    prompts = arriving(made, 0.2, 20)
    made.serve(prompts, 8.0)
    assert all(len(prompt.token_s) == prompt.answer for prompt in prompts)
    assert all(prompt.tpot_s <= 0.050 for prompt in prompts), [prompt.tpot_s for prompt in prompts]
    busy = [quantum for quantum in made.quanta if quantum.behind is not None]
    assert len(made.quanta) > 100 and (busy or not made.scheduler.enable_overlap)
    status: dict[str, Any] = made.host.side.status()
    assert status["requests_without_clock"] == 0
    assert status["requests_finished"] == status["requests_met_tpot"] == len(prompts)


def test_no_batch_is_taken_for_a_prefill(made: Server) -> None:
    made.serve(arriving(made, 0.3, 8), 4.0)
    assert all(launched.batch.forward_mode.is_decode() for launched in made.scheduler.batches)
    assert made.host.side.predictor.summary().get("prefill", {}).get("steps", 0) == 0


def test_the_time_of_a_transfer_trains_in_quanta_that_let_sglang_look(made: Server) -> None:
    """At an idle server: as many as fit, none longer than between two tokens."""
    made.scheduler.transfer_s = 1.0
    (prompt,) = prompts = [Prompt(made.now_s + 0.5, 100, 4)]
    made.serve(prompts, 2.0)
    joined_s = prompt.token_s[0]
    assert 1.0 <= joined_s - prompt.at_s < 1.0 + 0.25
    looks = [at for at in made.scheduler.looks_s if at < joined_s]
    gaps = [after - before for before, after in itertools.pairwise(looks)]
    assert gaps and max(gaps) <= 2 * 0.040 + 0.005  # two are queued on a device
    trained_s = sum(
        kernel.end_s - kernel.begin_s
        for quantum in made.quanta
        for kernel in quantum.kernels
        if prompt.at_s < kernel.begin_s < joined_s
    )
    assert trained_s > 0.5


def test_a_request_that_joins_the_batch_in_flight_is_in_the_slack(made: Server) -> None:
    """It has banked nothing, while the one before it has banked much."""
    first = Prompt(made.now_s + 0.1, 100, 400)
    late = Prompt(made.now_s + 2.0, 100, 30)
    made.serve([first, late], 6.0)
    assert late.tpot_s <= 0.050 and first.tpot_s <= 0.050

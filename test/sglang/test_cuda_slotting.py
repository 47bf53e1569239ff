"""Quanta beside SGLang's real loop on a fake CUDA device: what stands before and behind a batch in
flight, how long a prompt waits, which stream is measured, and what a slow host makes late."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.config import HarliOptions
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack
from sglang_harli.predictor.line.margin import CAP
from support.cuda.slotting_report import HOST_BOUND, arrivals, behind_prefills, idle_waits_s
from support.cuda.virtual_server import Cost, Model, Prompt, server
from support.trainer.co_trainer_host import temporary_run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


# ------------------------------------------------------------------ the batch in flight
def test_no_quantum_is_launched_behind_a_prefill_in_flight(run_dir: str) -> None:
    with server(run_dir) as made:
        prompts = arrivals(made, every_s=0.37, count=12, tokens=1000, answer=60)
        made.serve(prompts, 5.0)
        assert len(made.quanta) > 50 and not behind_prefills(made)
        assert all(prompt.token_s for prompt in prompts)
        prefills = [b for b in made.scheduler.batches if not b.batch.forward_mode.is_decode()]
        assert len(prefills) == len(prompts)


def test_a_prompt_in_chunks_is_computed_without_a_quantum_between_its_chunks(run_dir: str) -> None:
    options = HarliOptions(run_dir=run_dir, ttft_slo_ms=2000.0)
    with server(run_dir, chunk_tokens=200, options=options) as made:
        prompts = arrivals(made, every_s=0.6, count=4, tokens=1000, answer=30)
        made.serve(prompts, 3.0)
        assert made.quanta and not behind_prefills(made)


@pytest.mark.parametrize("ttft_ms", [None, 400.0])
def test_a_prefill_in_flight_is_in_the_slack(run_dir: str, ttft_ms: float | None) -> None:
    """Of the running requests, and of those whose first tokens are to come."""
    options = HarliOptions(
        run_dir=run_dir, ttft_slo_ms=ttft_ms, tpot_slo_ms=50.0 if ttft_ms is None else 500.0
    )
    with server(run_dir, options=options) as made:
        side, seen = made.host.side, []

        def slack(*given: Any, **named: Any) -> Slack:
            found, behind = ServingState.slack(side, *given, **named), made.scheduler.in_flight
            if behind is not None and not behind.batch.forward_mode.is_decode():
                without = ServingState.slack(side, *given, **{**named, "ahead": None})
                due_s = behind.batch.reqs[0].at_s + 0.4
                seen.append((found, without, due_s - given[2], side.predictor.prefill(2000).upper_s))
            return found

        side.slack = slack
        begin_s = made.now_s + 0.1
        prompts = [Prompt(begin_s, 100, 300), *(Prompt(begin_s + 0.5 * n, 2000, 4) for n in range(1, 5))]
        made.serve(prompts, 3.0)
        assert len(seen) >= 3
        for found, without, left_s, prefill_s in seen:
            if ttft_ms is None:
                assert found.bound == "tpot" and found.seconds == pytest.approx(without.seconds - prefill_s)
            else:
                assert found.bound == "ttft" and found.seconds < left_s - prefill_s


@pytest.mark.parametrize("grammar", [True, False])
def test_nothing_comes_between_a_forward_and_its_sampling(run_dir: str, grammar: bool) -> None:
    with server(run_dir) as made:
        prompts = [Prompt(made.now_s + 0.1, 100, 80, grammar=grammar) for _ in range(2)]
        made.serve(prompts, 2.0)
        names = [k.name.split()[0] for k in made.gpu.kernels if k.stream is made.scheduler.forward_stream]
        assert "quantum" in names
        followers = {b for a, b in itertools.pairwise(names) if a in ("decode", "prefill")}
        assert followers == {"sample"}
        beside = [q for q in made.quanta if prompts[0].token_s[0] < q.begin_s < prompts[0].token_s[-1]]
        assert len(beside) > 10  # a grammar keeps no job from training


# ------------------------------------------------------------------ an idle server
@pytest.mark.parametrize(
    ("ttft_ms", "bound_s", "token_s"),
    [(None, 0.25, 1e-3), (300.0, 0.15, 1e-3), (None, 0.25, 2e-4)],
    ids=["default bound", "half the TTFT target", "short quanta"],
)
def test_a_prompt_at_an_idle_server_waits_at_most_the_bound(
    run_dir: str, ttft_ms: float | None, bound_s: float, token_s: float
) -> None:
    options = HarliOptions(run_dir=run_dir, ttft_slo_ms=ttft_ms)
    with server(run_dir, cost=Cost(token_s=token_s), options=options) as made:
        waits_s = idle_waits_s(made, count=25)
        assert len(waits_s) == 25 and len(made.quanta) > 25
        assert max(waits_s) <= bound_s + 2e-3  # the host's own part: a turn of the loop, and the launch


def test_the_device_has_work_all_the_time_while_nothing_is_served(run_dir: str) -> None:
    with server(run_dir, cost=Cost(token_s=4e-4)) as made:
        begin_s = made.now_s
        made.serve([], 5.0)
        busy_s = sum(k.end_s - k.begin_s for q in made.quanta for k in q.kernels if k.begin_s >= begin_s)
        assert busy_s > 0.97 * 5.0


# ------------------------------------------------------------------ the stream of the forwards
@pytest.mark.parametrize("overlap", [True, False])
def test_times_are_those_of_the_stream_that_forwards_run_on(run_dir: str, overlap: bool) -> None:
    with server(run_dir, model=Model(decode_s=0.012), overlap=overlap) as made:
        made.serve(arrivals(made, every_s=0.5, count=4, tokens=200, answer=60), 3.0)
        scheduler = made.scheduler
        forwards = scheduler.forward_stream if overlap else scheduler.schedule_stream
        assert {k.stream for q in made.quanta for k in q.kernels} == {forwards}
        assert {b.kernel.stream for b in scheduler.batches} == {forwards}
        assert made.host.side.predictor.decode(1, 230).expected_s == pytest.approx(0.012, rel=0.1)


# ------------------------------------------------------------------ a slow host
def test_quanta_whose_launch_is_their_price_make_no_token_late(run_dir: str) -> None:
    options = HarliOptions(run_dir=run_dir, tpot_slo_ms=14.0)
    with server(run_dir, cost=HOST_BOUND, options=options) as made:
        prompts = arrivals(made, every_s=1.2, count=4, tokens=100, answer=100)
        made.serve(prompts, 6.0)
        beside = [q for q in made.quanta if q.behind is not None]
        assert len(beside) > 50
        assert max(prompt.tpot_s for prompt in prompts) <= 0.014
        lines = made.host.side.predictor.costs()
        assert max(line["upper_ratio"] for kind, line in lines.items() if line["seen"] > 60) < CAP / 2

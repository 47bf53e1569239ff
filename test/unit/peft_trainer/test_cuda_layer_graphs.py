"""Quanta as graphs: the oracle's numbers whenever graphs are made, replayed, moved or evicted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.graphs.cache import Captured, GraphCache
from sglang_harli.peft_trainer.graphs.graph_check import differs
from sglang_harli.peft_trainer.graphs.layer_graphs import (
    BUCKET,
    MOST_BYTES,
    LayerGraphs,
    bucket_of,
    launch_bound_tokens,
)
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import RunSpec
from support.cuda.graph_double import CaptureDouble
from support.trainer.trainer_oracle import (
    EXTRA,
    SIZES,
    Step,
    at_random,
    feed,
    hyperparameters,
    one_thread,
    random_steps,
    run_oracle,
    tiny_model,
    weights,
)

__all__ = ["one_thread"]  # a fixture

POSITIONS = SIZES["max_position_embeddings"]


def make(
    model: Any,
    steps: list[Step],
    capture: CaptureDouble,
    *,
    most: int = 64,
    most_bytes: int = 1 << 24,
    rows: int | None = None,
    **changes: Any,
) -> TrainingRun:
    def graphs(base: Any) -> LayerGraphs:
        like = base.model.lm_head.weight.detach()
        hidden = base.config.hidden_size
        return LayerGraphs(
            capture,
            most=most,
            most_bytes=most_bytes,
            most_tokens=4 * BUCKET,
            hidden=hidden,
            positions=POSITIONS,
            like=like,
        )

    spec = RunSpec(job="j", attempt=1, hyperparameters=hyperparameters(**changes), total_steps=len(steps))
    run = TrainingRun(
        from_transformers(model),
        spec,
        logits_bytes=1 << 20,
        quantum_rows=rows,
        keep_activations=False,
        graphs=graphs,
    )
    feed(run, steps)
    return run


def graphs_of(run: TrainingRun) -> LayerGraphs:
    assert run.graphs is not None
    return run.graphs


def whole(run: TrainingRun, *, idle: bool, until: int | None = None) -> None:
    """All rows at once, to the end or until so many steps are applied."""
    while (until is None or run.applied_step < until) and (shape := run.peek()) is not None:
        run.run(shape.rows, idle=idle)


def trained(run: TrainingRun, *, idle: float, seed: int = 0, spill_every: int = 0) -> list[float]:
    """Losses of the whole run; nothing is served before a share ``idle`` of the quanta."""
    rng, losses, count = random.Random(seed), [], 0
    choose = at_random(seed)
    while (shape := run.peek()) is not None:
        run.run(shape.rows if shape.fixed else choose(shape.rows), idle=rng.random() < idle)
        losses += [metrics.loss for metrics in run.take_metrics()]
        count += 1
        if spill_every and not count % spill_every and not run.spilled:
            run.spill()
    return losses


@pytest.mark.parametrize(
    ("arch", "options"),
    [*((arch, {}) for arch in EXTRA), ("llama", {"target_modules": ("k_proj", "o_proj", "down_proj")})],
    ids=[*EXTRA, "some linears"],
)
def test_a_run_with_graphs_trains_as_transformers_and_peft_do(arch: str, options: dict[str, Any]):
    model, steps = tiny_model(arch), random_steps(4, 2, 2)
    options = {"gradient_accumulation_steps": 2, **options}
    expected = run_oracle(model, hyperparameters(**options), steps)
    run = make(model, steps, CaptureDouble(), **options)
    assert trained(run, idle=0.5) == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected.weights[name].to(tensor.dtype), rtol=1e-5, atol=1e-6)
    assert graphs_of(run).captured > 4 and graphs_of(run).replayed > graphs_of(run).captured


def test_no_graph_is_made_while_a_request_runs_and_those_that_are_there_are_replayed():
    model, steps = tiny_model(), random_steps(6, 2, 1, longest=8)
    capture = CaptureDouble()
    run = make(model, steps, capture)
    assert len(trained(run, idle=0.0)) == len(steps)
    assert not capture.graphs and not graphs_of(run).replayed

    run = make(model, steps, capture)
    whole(run, idle=True, until=3)
    made, before = len(capture.graphs), graphs_of(run).replayed
    whole(run, idle=False)
    assert len(capture.graphs) == made > 0
    assert graphs_of(run).replayed > before


def test_a_shape_that_came_once_is_run_eagerly():
    model, steps = tiny_model(), random_steps(1, 2, 1)
    capture = CaptureDouble()
    run = make(model, steps, capture)
    whole(run, idle=True)
    assert not capture.graphs


def test_graphs_of_weights_that_have_moved_are_made_anew():
    model, steps = tiny_model(), random_steps(8, 2, 1)
    expected = run_oracle(model, hyperparameters(), steps)
    run = make(model, steps, CaptureDouble())
    assert trained(run, idle=1.0, spill_every=11) == pytest.approx(expected.losses, rel=1e-5)
    assert graphs_of(run).cache.stale > 0


@pytest.mark.parametrize(("most", "most_bytes"), [(3, 1 << 24), (64, 400_000 + 2 * 4 * BUCKET * 32 * 8)])
def test_graphs_are_bounded_in_count_and_bytes(most: int, most_bytes: int):
    model, steps = tiny_model(), random_steps(6, 3, 1)
    expected = run_oracle(model, hyperparameters(), steps)
    run = make(model, steps, CaptureDouble(nbytes=60_000), most=most, most_bytes=most_bytes)
    assert trained(run, idle=1.0) == pytest.approx(expected.losses, rel=1e-5)
    cache = graphs_of(run).cache
    assert cache.evicted > 0 and len(cache) <= most and cache.nbytes <= cache.most_bytes < most_bytes


def test_a_capture_that_fails_ends_graphs_and_not_the_run(caplog: pytest.LogCaptureFixture):
    model, steps = tiny_model(), random_steps(6, 2, 1)
    run = make(model, steps, CaptureDouble(fails="operation not permitted"))
    assert len(trained(run, idle=1.0)) == len(steps)
    assert "operation not permitted" in graphs_of(run).failed
    assert sum("without CUDA graphs" in record.message for record in caplog.records) == 1


def test_a_graph_that_is_too_large_is_not_made_again_and_again(caplog: pytest.LogCaptureFixture):
    model, steps = tiny_model(), random_steps(6, 2, 1)
    capture = CaptureDouble(nbytes=1 << 24)
    run = make(model, steps, capture)
    assert len(trained(run, idle=1.0)) == len(steps)
    assert len(capture.graphs) == 1 and "is the most for all" in graphs_of(run).failed
    assert sum("without CUDA graphs" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("working", [None, 1 << 20])
def test_graphs_have_their_part_of_what_quanta_take(working: int | None):
    """A quarter at most, and quanta the rest."""
    asked: list[tuple[int, ...]] = []

    def graphs(base: Any, *most_bytes: int) -> LayerGraphs:
        asked.append(most_bytes)
        return LayerGraphs.of(base, CaptureDouble(), *most_bytes)

    spec = RunSpec(job="j", attempt=1, hyperparameters=hyperparameters(), total_steps=1)
    run = TrainingRun(
        from_transformers(tiny_model()), spec, logits_bytes=1 << 20, graphs=graphs, working_bytes=working
    )
    left = None if working is None else 3 * working // 4
    assert asked == [() if working is None else (working // 4,)] and run._bound.nbytes == left
    assert graphs_of(run).most_bytes == (MOST_BYTES if working is None else working // 4)


@pytest.mark.parametrize("refusing", [{"rows": 1}, {"lora_dropout": 0.1}], ids=["fixed split", "dropout"])
def test_runs_whose_bits_or_masks_rule_graphs_out_have_none(refusing: dict[str, Any]):
    assert make(tiny_model(), random_steps(1, 2, 1), CaptureDouble(), **refusing).graphs is None


def test_the_memory_of_graphs_goes_with_the_run():
    model, steps = tiny_model(), random_steps(6, 2, 1)
    run = make(model, steps, CaptureDouble())
    trained(run, idle=1.0)
    graphs = graphs_of(run)
    assert len(graphs.cache)
    run.release()
    assert not len(graphs.cache) and not graphs.cache.nbytes


# ------------------------------------------------------------------ which quanta, which bucket
def test_buckets_hold_the_width_and_no_more_positions_than_the_model_has():
    assert [bucket_of(width) for width in (1, BUCKET, BUCKET + 1)] == [BUCKET, BUCKET, 2 * BUCKET]
    assert bucket_of(BUCKET + 1, positions=BUCKET + 20) == BUCKET + 20


def test_large_layers_have_graphs_for_few_tokens_only():
    small, large = launch_bound_tokens(15_700_000), launch_bound_tokens(218_000_000)
    assert 256 < large < 1024 < small


# ------------------------------------------------------------------ the cache
class Nothing:
    def replay(self) -> None: ...


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 1)), max_size=60),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_the_cache_keeps_the_last_used_within_its_bounds(calls: list[Any], most: int, most_bytes: int):
    cache, used = GraphCache(most, most_bytes), list[int]()
    for key, nbytes, place in calls:
        if cache.get(key, (place,)) is None:
            kept = cache.put(key, Captured(Nothing(), nbytes, (place,)))
            assert kept == (most > 0 and nbytes <= most_bytes)
        used = [each for each in used if each != key] + [key]
        assert len(cache) <= most and cache.nbytes <= most_bytes
        held = list(cache._graphs)
        assert held == [each for each in used if each in held]
    cache.clear()
    assert not len(cache) and not cache.nbytes


# ------------------------------------------------------------------ the comparison before they are used
class Forgetful(CaptureDouble):
    """Its graphs leave one product out."""

    def capture(self, work: Any) -> Any:
        graph, nbytes = super().capture(work)
        products = [each for each in graph.operations if "mm" in each.function._schema.name]
        graph.operations.remove(products[-1])
        return graph, nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_that_compute_the_same_may_be_used(dtype: torch.dtype):
    assert differs(from_transformers(tiny_model("qwen3", dtype)), CaptureDouble()) is None


def test_graphs_that_do_not_are_refused_in_one_sentence():
    base = from_transformers(tiny_model("llama", torch.float32))
    assert "differs by" in (differs(base, Forgetful()) or "")
    assert "not permitted" in (differs(base, CaptureDouble(fails="operation not permitted")) or "")


def test_a_quantum_in_which_a_graph_was_made_teaches_no_price():
    model, steps = tiny_model(), random_steps(4, 2, 1, longest=8)
    run, misled = make(model, steps, CaptureDouble()), 0
    while (shape := run.peek()) is not None:
        before = graphs_of(run).captured
        done = run.run(shape.rows, idle=True)
        assert done.misleads == (graphs_of(run).captured > before)
        misled += done.misleads
    assert misled

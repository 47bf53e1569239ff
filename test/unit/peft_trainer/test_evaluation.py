"""Evaluation in a run: a plain loop's loss and accuracy, and no trace of it in training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.evaluation import EvaluationMetrics
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, EvaluationState
from support.trainer.evaluation_feed import Validation, feed_all, plain_evaluation
from support.trainer.trainer_oracle import (
    at_random,
    cut,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    random_steps,
    run_oracle,
    tiny_model,
    weights,
)

__all__ = ["one_thread"]  # a fixture

HP = hyperparameters(gradient_accumulation_steps=2, lora_dropout=0.1, learning_rate=1e-2)
STEPS = random_steps(4, 2, 2)
ROWS = random_steps(1, 6, 1, seed=9, longest=150)[0].rows
EVERY_TWO = Validation(ROWS, every=2, size=3)


def evaluated(
    run: TrainingRun, choose: Any = everything, *, drop_after: int = 0
) -> tuple[list[EvaluationMetrics], list[dict[str, torch.Tensor]]]:
    """Run to the end: each evaluation, and the weights that it was of."""
    found, states, quanta = [], [], itertools.count(1)
    while (shape := run.peek()) is not None:
        if shape.kind is QuantumKind.FORWARD and not shape.fixed and run.evaluating and next(quanta) % 3 == 0:
            cut(run)
            shape = run.peek()
            assert shape is not None
        run.run(shape.rows if shape.fixed else choose(shape.rows))
        if drop_after and next(quanta) % drop_after == 0:
            run.drop_micro_batch()
        for metrics in run.take_evaluations():
            found.append(metrics)
            states.append(weights(run))
    return found, states


@pytest.mark.parametrize(("arch", "choose"), [("llama", everything), ("qwen3", at_random(3))])
def test_loss_and_accuracy_are_those_of_a_plain_loop(arch: str, choose: Any) -> None:
    model = tiny_model(arch, torch.float32)
    run = make_run(model, HP, STEPS, logits_bytes=4 * 90 * 5)
    feed_all(run, STEPS, EVERY_TWO)
    found, states = evaluated(run, choose)
    assert run.finished and [m.step for m in found] == [2, 4]
    for metrics, state in zip(found, states, strict=True):
        loss, accuracy = plain_evaluation(model, HP, state, ROWS)
        assert metrics.loss == pytest.approx(loss, rel=1e-5)
        assert metrics.accuracy == pytest.approx(accuracy)
        assert (metrics.full_loss, metrics.full_accuracy) == (metrics.loss, metrics.accuracy)
        assert metrics.rows == len(ROWS)
        assert metrics.target_tokens == sum(sum(t != -100 for t in labels[1:]) for _, labels in ROWS)


def test_a_sample_of_the_rows_and_all_of_them_at_the_end() -> None:
    model = tiny_model("llama", torch.float32)
    run = make_run(model, HP, STEPS)
    feed_all(run, STEPS, Validation(ROWS, every=2, size=2, sampled=2))
    (early, last), states = evaluated(run)
    assert (early.rows, early.full_loss) == (4, None)
    assert early.loss == pytest.approx(plain_evaluation(model, HP, states[0], ROWS[:4])[0], rel=1e-5)
    assert last.loss == pytest.approx(plain_evaluation(model, HP, states[1], ROWS[:4])[0], rel=1e-5)
    loss, accuracy = plain_evaluation(model, HP, states[1], ROWS)
    assert (last.full_loss, last.full_accuracy) == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy))


def test_training_leaves_the_same_bits_with_evaluations_in_between() -> None:
    model = tiny_model("llama", torch.float32)
    bare = make_run(model, HP, STEPS, rows=2)
    feed(bare, STEPS)
    expected = drive(bare, everything)
    run = make_run(model, HP, STEPS, rows=2)
    feed_all(run, STEPS, EVERY_TWO)
    metrics = []
    while (shape := run.peek()) is not None:
        run.run(shape.rows)
        metrics += run.take_metrics()
        run.take_evaluations()
    assert [m.loss for m in metrics] == expected.losses
    assert run.tokens == bare.tokens
    for (name, a), (_, b) in zip(run.state_tensors(), bare.state_tensors(), strict=True):
        assert torch.equal(a, b), name


def test_dropped_micro_batches_are_evaluated_again() -> None:
    model = tiny_model("llama", torch.float32)
    run = make_run(model, HP, STEPS, rows=2)
    feed_all(run, STEPS, EVERY_TWO)
    expected, _ = evaluated(run)
    again = make_run(model, HP, STEPS, rows=2)
    feed_all(again, STEPS, EVERY_TWO)
    assert evaluated(again, drop_after=17)[0] == expected


def test_a_run_restored_within_an_evaluation_repeats_it() -> None:
    model = tiny_model("llama", torch.float32)
    run = make_run(model, HP, STEPS, rows=2)
    feed_all(run, STEPS, EVERY_TWO)
    expected, _ = evaluated(run)

    run = make_run(model, HP, STEPS, rows=2)
    feed_all(run, STEPS, EVERY_TWO)
    while not (run.evaluating and run.taken.index == 3):  # one of its micro-batches is done
        run.run(run.peek().rows)  # type: ignore[union-attr]
    assert run.at_step_boundary and run.state_consistent and not run.finished
    state, meta = {name: t.clone() for name, t in run.state_tensors()}, run.state_meta()
    assert meta["evaluation"]["step"] == 0
    run.release()

    again = make_run(model, HP, STEPS, rows=2)
    again.load_state(state.__getitem__, meta, BatchCursor(epoch=1, step=2, index=2))
    assert again.evaluating
    feed_all(again, STEPS, EVERY_TWO, start=3)
    assert evaluated(again)[0] == expected


def test_it_holds_the_memory_of_one_layers_input() -> None:
    model = tiny_model("llama", torch.float32)
    run = make_run(model, HP, STEPS)
    feed_all(run, STEPS, EVERY_TWO)
    while not run.evaluating:
        run.run(run.peek().rows)  # type: ignore[union-attr]
    rows = run._intake.queue[0].rows
    specs = run._micro_memory.specs(rows)
    assert [shape for shape, _ in specs] == [(3, rows.width, 32), (len(rows.targets), 90)]


def test_steps_count_correct_predictions() -> None:
    hp = hyperparameters(gradient_accumulation_steps=2)
    model = tiny_model("llama", torch.float32)
    run = make_run(model, hp, STEPS[:1])
    start = {}
    feed(run, STEPS[:1])
    while (shape := run.peek()) is not None:
        if run.ready and not start:
            start = weights(run)
        run.run(shape.rows)
    [metrics] = run.take_metrics()
    _, accuracy = plain_evaluation(model, hp, start, STEPS[0].rows)
    assert metrics.accuracy == pytest.approx(accuracy)
    assert metrics.loss == pytest.approx(run_oracle(model, hp, STEPS[:1]).losses[0], rel=1e-5)


def test_patience_ends_training_before_its_last_step() -> None:
    model = tiny_model("llama", torch.float32)
    hp = hyperparameters(
        gradient_accumulation_steps=2, early_stopping_patience=1, early_stopping_min_delta=1e6
    )
    run = make_run(model, hp, STEPS)
    feed_all(run, STEPS, Validation(ROWS, every=1, size=4))
    found, _ = evaluated(run)
    assert [m.step for m in found] == [1, 2] and run.applied_step == 2
    assert run.finished and run.peek() is None
    assert found[-1].state.stale == 1


@pytest.mark.parametrize(
    ("losses", "min_delta", "best", "stale"),
    [
        ([3.0, 2.0, 2.5], 0.0, (2, 2.0), 1),
        ([3.0, 2.95, 2.9], 0.1, (3, 2.9), 2),  # the best one, but by too little
        ([float("nan"), 2.0], 0.0, (2, 2.0), 0),
        ([2.0, float("inf"), float("nan")], 0.0, (1, 2.0), 2),
        ([2.0, 2.0], 0.0, (1, 2.0), 1),
    ],
)
def test_what_evaluations_come_to(
    losses: list[float], min_delta: float, best: tuple[int, float], stale: int
) -> None:
    state = EvaluationState()
    for step, loss in enumerate(losses, start=1):
        state = state.after(step, loss, min_delta)
    assert ((state.best_step, state.best_loss), state.stale) == (best, stale)
    assert state.step == len(losses)

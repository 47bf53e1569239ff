"""Rows that are taken in blocks of tokens: the oracle's numbers, whatever is cut and dropped on the
way."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.device_sizes import sizes_of
from sglang_harli.peft_trainer.layers.attention import SHORT
from sglang_harli.peft_trainer.run import TrainingRun
from support.trainer.poisoned_memory import PoisonedMemory
from support.trainer.trainer_oracle import (
    EXTRA,
    Outcome,
    Step,
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

BLOCK = sizes_of("cpu").token_block
LONGEST = SHORT + BLOCK + 7
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"gradient_accumulation_steps": 2, "lora_dropout": 0.2, "use_rslora": True},
    "attention only": {"target_modules": ("k_proj", "o_proj")},
    "mlp only": {"target_modules": ("gate_proj", "down_proj"), "lora_dropout": 0.1},
}


def long_steps(count: int, micro_batches: int = 1) -> list[Step]:
    return random_steps(count, 3, micro_batches, longest=LONGEST)


def run_cut(run: TrainingRun, seed: int, share: float) -> tuple[Outcome, int]:
    """Rows are cut at random and taken in random numbers of blocks; the quanta of blocks that were
    run."""
    rng, outcome, blocks = random.Random(seed), Outcome(), 0
    while (shape := run.peek()) is not None:
        if rng.random() < share and cut(run):
            shape = run.peek()
            assert shape is not None
        if rng.random() < 0.01:
            run.drop_micro_batch()
            continue
        blocks += bool(shape.attended)
        done = run.run(shape.rows if shape.fixed else rng.randint(1, shape.rows))
        assert not shape.attended or done.row_tokens == shape.attended >= done.tokens
        for metrics in run.take_metrics():
            outcome.losses.append(metrics.loss)
            outcome.norms.append(metrics.grad_norm)
    outcome.weights = weights(run)
    return outcome, blocks


def compare(mine: Outcome, oracle: Outcome) -> None:
    assert mine.losses == pytest.approx(oracle.losses, rel=1e-9)
    assert mine.norms == pytest.approx(oracle.norms, rel=1e-7)
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(mine.weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arch", EXTRA)
def test_double_precision_equals_the_oracle(arch: str, options: dict[str, Any]) -> None:
    hp = hyperparameters(**options)
    steps = long_steps(3, hp.gradient_accumulation_steps)
    model = tiny_model(arch)
    oracle = run_oracle(model, hp, steps)
    for seed, keep in ((1, False), (2, True)):
        memory = PoisonedMemory()
        run = make_run(model, hp, steps, memory=memory, keep=keep)
        feed(run, steps)
        outcome, blocks = run_cut(run, seed, 0.5)
        assert run.finished and blocks > 10
        compare(outcome, oracle)
        run.release()
        assert not memory.held


@pytest.mark.parametrize("window", [BLOCK // 2, BLOCK + 5, 2 * BLOCK + 1])
def test_windows_that_reach_over_blocks(window: int) -> None:
    hp, steps = hyperparameters(), long_steps(2)
    model = tiny_model("mistral", sliding_window=window)
    run = make_run(model, hp, steps)
    feed(run, steps)
    outcome, blocks = run_cut(run, 3, 1.0)
    assert blocks
    compare(outcome, run_oracle(model, hp, steps))
    run.release()


def test_single_precision_first_gradients() -> None:
    hp = hyperparameters(max_grad_norm=0.0, lora_dropout=0.1)
    steps = long_steps(1)
    model = tiny_model("qwen3", torch.float32)
    oracle = run_oracle(model, hp, steps)
    run = make_run(model, hp, steps)
    feed(run, steps)
    while (shape := run.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
        if not cut(run):
            run.run(shape.rows if shape.fixed else 1)
    for block in run._adapter.blocks:
        for matrix in block.matrices:
            expected = oracle.first_grads[matrix.key]
            assert (matrix.of(block.grad) - expected).norm() <= 1e-5 * expected.norm(), matrix.key
    run.release()


def test_one_row_is_cut_and_the_next_is_offered_whole() -> None:
    rows = [([3] * n, [3] * n) for n in (2 * BLOCK + 2, BLOCK + 1, BLOCK)]
    steps = [Step(rows, [[0, 1, 2]])] * 2
    memory = PoisonedMemory()
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory, keep=False)
    feed(run, steps)
    seen: list[tuple[str, int, int, int]] = []

    def take(rows: int) -> None:
        shape = run.peek()
        assert shape is not None
        done = run.run(rows)
        seen.append((shape.kind, shape.rows, done.tokens, done.row_tokens))

    while not cut(run):
        run.run(run.peek().rows)  # type: ignore[union-attr]
    assert not cut(run)  # it is
    for _ in range(3):
        take(1)
    assert seen == [
        ("forward", 3, BLOCK, 2 * BLOCK + 2),
        ("forward", 2, BLOCK, 2 * BLOCK + 2),
        ("forward", 1, 2, 2 * BLOCK + 2),
    ]
    seen.clear()
    assert cut(run)
    take(2)
    assert not cut(run)  # the last one is a block
    take(1)
    assert seen == [("forward", 2, BLOCK + 1, BLOCK + 1), ("forward", 1, BLOCK, BLOCK)]
    seen.clear()
    while run.peek().kind != QuantumKind.BACKWARD:  # type: ignore[union-attr]
        run.run(run.peek().rows)  # type: ignore[union-attr]
    assert cut(run)
    keys_first = run.peek()
    assert keys_first is not None and (keys_first.kind, keys_first.rows) == (QuantumKind.FORWARD, 3)
    assert run.run(3).misleads  # what it took is no forward's time
    take(2)
    take(1)
    take(2)
    assert seen == [
        ("backward", 3, 2 * BLOCK, 2 * BLOCK + 2),
        ("backward", 1, 2, 2 * BLOCK + 2),
        ("backward", 2, 2 * BLOCK + 2, BLOCK + 1),
    ]
    drive(run, everything)
    assert run.drop_unused()
    assert not memory.bytes_of(MemoryPurpose.MICRO_BATCH)
    run.release()


def test_without_memory_for_its_keys_a_row_stays_whole() -> None:
    allowed = True

    def grants(purpose: MemoryPurpose, _nbytes: int) -> bool:
        return allowed or purpose != MemoryPurpose.MICRO_BATCH

    steps = long_steps(1)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=PoisonedMemory(grants))
    feed(run, steps)
    while run.peek().kind != QuantumKind.FORWARD:  # type: ignore[union-attr]
        run.run(run.peek().rows)  # type: ignore[union-attr]
    allowed = False
    shape = run.peek()
    assert cut(run) and run.peek() == shape and not cut(run)
    allowed = True
    assert not cut(run)  # it is not tried again for this row
    run.run(1)
    assert cut(run)
    blocks = run.peek()
    assert blocks is not None and blocks.attended
    drive(run, everything)
    assert run.finished
    run.release()


def test_a_fixed_split_is_not_cut() -> None:
    steps = long_steps(1)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, rows=1)
    feed(run, steps)
    while (shape := run.peek()) is not None:
        assert not cut(run)
        run.run(shape.rows)
    run.release()

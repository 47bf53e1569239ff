"""Logits are cut where memory is free in pieces too small for them; nothing else changes."""

from __future__ import annotations

import pytest
import torch

from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.errors import StateError
from sglang_harli.peft_trainer.memory.activations import LEAST_HEAD_TOKENS
from support.trainer.poisoned_memory import PoisonedMemory
from support.trainer.trainer_oracle import (
    Step,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    run_oracle,
    tiny_model,
)

__all__ = ["one_thread"]  # a fixture

STEPS = [Step([([3] * 120, [3] * 120)] * 3, [[0, 1, 2]])] * 2  # 357 or 360 target tokens
VOCABULARY = 90


def limited(most: int, *, scattered: bool) -> PoisonedMemory:
    """Grants no micro-batch whose logits are of more than ``most`` target tokens."""

    def grants(purpose: MemoryPurpose, nbytes: int) -> bool:
        return purpose != MemoryPurpose.MICRO_BATCH or nbytes <= limit[0] or memory.free

    memory = PoisonedMemory(grants)
    memory.scattered, memory.free = scattered, False  # type: ignore[attr-defined]
    limit = [most]
    return memory


def bytes_of_micro_batch(tokens: int) -> int:
    """With logits of so many tokens at once, in fp32."""
    memory = PoisonedMemory()
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), STEPS, memory=memory)
    run._micro_memory.head_tokens = run._micro_memory._most_head_tokens = tokens
    feed(run, STEPS)
    while (shape := run.peek()) is not None and shape.kind != QuantumKind.EMBED:
        run.run(shape.rows)
    asked = next(nbytes for purpose, nbytes in memory.asked if purpose == MemoryPurpose.MICRO_BATCH)
    run.release()
    return asked


def test_the_head_is_cut_until_it_fits_and_the_numbers_stay() -> None:
    oracle = run_oracle(tiny_model(dtype=torch.float64), hyperparameters(), STEPS)
    memory = limited(bytes_of_micro_batch(100), scattered=True)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), STEPS, memory=memory)
    feed(run, STEPS)
    heads = []
    while (shape := run.peek()) is not None:
        done = run.run(shape.rows)
        heads += [done.tokens] * (done.kind == QuantumKind.HEAD)
    losses = [metrics.loss for metrics in run.take_metrics()]
    assert run.finished and LEAST_HEAD_TOKENS <= max(heads) <= 100 and len(heads) >= 8
    assert losses == pytest.approx(oracle.losses[-len(losses) :], rel=1e-5)
    run.release()


@pytest.mark.parametrize(("scattered", "rows"), [(False, None), (True, 2)], ids=["short", "fixed split"])
def test_where_less_would_not_help_or_bits_must_stay_the_run_waits(scattered: bool, rows: int | None) -> None:
    memory = limited(bytes_of_micro_batch(100), scattered=scattered)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), STEPS, memory=memory, rows=rows)
    feed(run, STEPS)
    drive(run, everything)
    assert run.needs_memory is not None and run.needs_memory[0] == MemoryPurpose.MICRO_BATCH
    with pytest.raises(StateError, match="waits for memory"):
        run.run(1)
    memory.free = True  # type: ignore[attr-defined]
    drive(run, everything)
    assert run.finished
    run.release()

"""A training run on real pools, while requests take their memory back: the weights show nothing of
it."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.peft_trainer.run import TrainingRun
from support.pool_parts import Clock, Slots, small_pool
from support.trainer.trainer_oracle import (
    Outcome,
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

HP = hyperparameters(gradient_accumulation_steps=2, lora_dropout=0.1, weight_decay=0.1)
STEPS = random_steps(4, 4, 2)


class Serving:
    """Requests that come and go at random on a pool of three times what training needs.

    Args:
        backing: ``host`` or ``static``; NaN in all memory that goes to training.
    """

    def __init__(self, backing: str, seed: int) -> None:
        geometry = PoolGeometry(slots=64 * 96 + 17, row_bytes=256, buffers=4, page_size=1, stripe_slots=64)
        made = {"host": HostBacking, "static": StaticBacking}[backing]
        device = {} if backing == "host" else {"device": torch.device("cpu")}
        self.pool: UnifiedPool
        self.slots: Slots
        self.clock: Clock
        self.pool, self.slots, self.clock = small_pool(geometry, backing=made(geometry, debug=True, **device))
        self.pressure = MemoryPressure(self.pool, torch.device("cpu"))
        self.random = random.Random(seed)
        self.requests: list[list[int]] = []
        self.kv = [self.pool.backing.kv_bytes(b).view(geometry.slots, -1) for b in range(geometry.buffers)]

    def turn(self) -> None:
        """A request comes, or goes; memory that is lent is taken back where it needs it."""
        self.clock.now_s += 40.0  # no cool-down holds training back
        if self.requests and self.random.random() < 0.7:
            self.slots.release(self.requests.pop(self.random.randrange(len(self.requests))))
        elif self.random.random() < 0.3:
            most = self.slots.available_size()
            taken = self.slots.alloc(self.random.choice([most // 8, most // 3, most]))
            assert taken is not None
            for kv in self.kv:
                kv[taken] = 7
            self.requests.append(taken)
        self.pressure.tick()

    def hold(self, run: TrainingRun) -> None:
        def no_need(reason: str) -> None:
            raise AssertionError(f"the run was dropped: {reason}")

        self.pressure.attach(run, 0, no_need)

    def end(self) -> None:
        """No request: all memory is free."""
        for taken in self.requests:
            self.slots.release(taken)
        self.requests.clear()


@torch.inference_mode()
def train(run: TrainingRun, serving: Serving, seed: int) -> tuple[Outcome, set[QuantumKind]]:
    """Inside SGLang's inference mode, as in its scheduler: tensors made there could not be trained
    on."""
    outcome, kinds, rng = Outcome(), set(), random.Random(seed)
    waited = 0
    while not run.finished:
        serving.turn()
        shape = run.peek()
        if shape is None:
            assert run.needs_memory is not None
            if (waited := waited + 1) > 30:
                serving.end()
            assert waited < 60, run.needs_memory
            continue
        waited = 0
        if shape.kind == QuantumKind.BACKWARD_KEPT and rng.random() < 0.2:
            cut(run)  # as where it is too long for now
            continue
        kinds.add(run.run(shape.rows if shape.fixed else rng.randint(1, shape.rows)).kind)
        for metrics in run.take_metrics():
            outcome.losses.append(metrics.loss)
            outcome.norms.append(metrics.grad_norm)
    serving.end()
    outcome.weights = weights(run)
    return outcome, kinds


@pytest.mark.parametrize("backing", ["host", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_split_ends_at_the_same_bits(backing: str, dtype: torch.dtype) -> None:
    plain = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2)
    feed(plain, STEPS)
    expected = drive(plain, everything)
    plain.release()
    spills = 0
    for seed in range(3):
        serving = Serving(backing, seed)
        run = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2, memory=serving.pressure.memory)
        serving.hold(run)
        feed(run, STEPS)
        outcome, kinds = train(run, serving, seed)
        assert outcome.losses == expected.losses and QuantumKind.BACKWARD_KEPT not in kinds
        for name, weight in expected.weights.items():
            assert torch.equal(outcome.weights[name], weight), name
        spills += serving.pressure.spills
        assert serving.pool.reclaims and serving.pressure.dropped_micro_batches
        run.release()
        assert not serving.pool.train_stripes
        serving.pool.check()
    assert spills


@pytest.mark.parametrize("backing", ["host", "static"])
def test_any_split_with_kept_activations_equals_the_oracle(backing: str) -> None:
    model = tiny_model("qwen3")
    oracle = run_oracle(model, HP, STEPS)
    kinds: set[QuantumKind] = set()
    for seed in range(3):
        serving = Serving(backing, seed)
        run = make_run(model, HP, STEPS, memory=serving.pressure.memory)
        serving.hold(run)
        feed(run, STEPS)
        outcome, seen = train(run, serving, seed)
        kinds |= seen
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-9)
        for name, weight in oracle.weights.items():
            torch.testing.assert_close(outcome.weights[name], weight, rtol=1e-5, atol=1e-6)
        held = serving.pool.bytes_by_purpose()
        assert held[MemoryPurpose.STATE] > 0
        run.release()
        assert not serving.pool.train_stripes
        serving.pool.check()
    assert {QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT} <= kinds

"""The layer-wise step against the oracle: a plain transformers + peft loop
(docs/internals/training-step.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.layers.attention import SHORT
from support.trainer.trainer_oracle import (
    EXTRA,
    VOCABULARY,
    Choose,
    Outcome,
    Step,
    at_most,
    at_random,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    random_steps,
    run_oracle,
    tiny_model,
)

__all__ = ["one_thread"]  # a fixture

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "cosine": {"lr_scheduler": "cosine", "warmup_ratio": 0.25},
    "constant": {"lr_scheduler": "constant", "warmup_ratio": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "dropout": {"lora_dropout": 0.2, "gradient_accumulation_steps": 2},
    "rslora": {"use_rslora": True, "lora_r": 5, "lora_alpha": 3.0},
    "some targets": {"target_modules": ("q_proj", "down_proj"), "seed": 7},
    "mlp alone": {"target_modules": ("gate_proj", "up_proj", "down_proj")},
}
EVERYTHING = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "lr_scheduler": "cosine",
    "weight_decay": 0.1,
    "lora_dropout": 0.1,
    "use_rslora": True,
}
SPLITS: dict[str, Choose] = {
    "all rows": everything,
    "1 row": at_most(1),
    "2 rows": at_most(2),
    "3 rows": at_most(3),
    "random": at_random(5),
}


def layer_wise(model: Any, hp: Any, steps: list[Step], choose: Choose, rows: int | None = None) -> Outcome:
    run = make_run(model, hp, steps, rows=rows, keep=False)
    try:
        feed(run, steps)
        outcome = drive(run, choose)
        assert run.finished
        return outcome
    finally:
        run.release()


def compare(mine: Outcome, oracle: Outcome) -> None:
    assert mine.losses == pytest.approx(oracle.losses, rel=1e-9)
    assert mine.norms == pytest.approx(oracle.norms, rel=1e-7)
    assert mine.rates == pytest.approx(oracle.rates)
    assert list(mine.weights) and mine.weights.keys() == oracle.weights.keys()
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(mine.weights[name], weight, rtol=1e-5, atol=1e-6)
    moved = sum((oracle.weights[k] - oracle.start[k]).abs().sum() for k in oracle.weights)
    assert moved > 1.0  # the comparison is not between two runs that did nothing


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arch", EXTRA)
def test_double_precision_equals_the_oracle_for_every_option(arch: str, options: dict[str, Any]) -> None:
    hp = hyperparameters(**options)
    steps = random_steps(20, 3, hp.gradient_accumulation_steps)
    model = tiny_model(arch)
    compare(layer_wise(model, hp, steps, at_random(5)), run_oracle(model, hp, steps))


@pytest.mark.parametrize("arch", EXTRA)
def test_double_precision_equals_the_oracle_for_every_split(arch: str) -> None:
    hp = hyperparameters(**EVERYTHING)
    steps = random_steps(20, 4, hp.gradient_accumulation_steps)
    model = tiny_model(arch)
    oracle = run_oracle(model, hp, steps)
    for choose in SPLITS.values():
        compare(layer_wise(model, hp, steps, choose), oracle)
    compare(layer_wise(model, hp, steps, everything, rows=3), oracle)


@pytest.mark.parametrize("arch", ["mistral", "qwen3"])
def test_rows_of_every_attention_kernel(arch: str) -> None:
    """Rows on both sides of the length where the backward's attention changes; windows are
    short."""
    hp = hyperparameters()
    steps = random_steps(3, 2, 1, longest=SHORT) + random_steps(3, 2, 1, seed=2, longest=2 * SHORT)
    assert max(len(ids) for step in steps for ids, _ in step.rows) > SHORT
    model = tiny_model(arch)
    mine, oracle = layer_wise(model, hp, steps, at_random(4)), run_oracle(model, hp, steps)
    assert mine.losses == pytest.approx(oracle.losses, rel=1e-9)
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(mine.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_an_activation_that_is_not_silu() -> None:
    hp = hyperparameters()
    steps = random_steps(20, 3, 1)
    model = tiny_model("llama", hidden_act="gelu")
    compare(layer_wise(model, hp, steps, at_random(3)), run_oracle(model, hp, steps))


@pytest.mark.parametrize("arch", EXTRA)
def test_single_precision_first_gradients_and_every_loss(arch: str) -> None:
    hp = hyperparameters(gradient_accumulation_steps=2, max_grad_norm=0.0)
    steps = random_steps(20, 3, 2)
    model = tiny_model(arch, torch.float32)
    oracle = run_oracle(model, hp, steps)
    for choose in (everything, at_most(1), at_random(5)):
        run = make_run(model, hp, steps, keep=False)
        feed(run, steps)
        while run.peek().kind != QuantumKind.OPTIMIZER:  # type: ignore[union-attr]
            shape = run.peek()
            assert shape is not None
            run.run(shape.rows if shape.fixed else choose(shape.rows))
        for block in run._adapter.blocks:
            for matrix in block.matrices:
                expected = oracle.first_grads[matrix.key]
                error = (matrix.of(block.grad) - expected).norm()
                assert error <= 1e-5 * expected.norm(), matrix.key
        outcome = drive(run, choose)
        run.release()
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)


def test_free_split_stays_within_the_promise_after_100_steps() -> None:
    hp = hyperparameters()
    steps = random_steps(100, 4, 1)
    model = tiny_model("llama", torch.float32)
    one = layer_wise(model, hp, steps, everything)
    other = layer_wise(model, hp, steps, at_random(2))
    start = run_oracle(model, hp, []).start
    assert one.losses == pytest.approx(other.losses, rel=1e-5)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum((a[k] - b[k]).square().sum().item() for k in a))

    assert distance(one.weights, other.weights) < 1e-3 * distance(one.weights, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_follow_the_exact_losses(dtype: torch.dtype) -> None:
    hp = hyperparameters(learning_rate=5e-3)
    steps = random_steps(20, 4, 1)
    exact = run_oracle(tiny_model("llama"), hp, steps)
    mine = layer_wise(tiny_model("llama", dtype), hp, steps, at_random(1))
    assert mine.losses == pytest.approx(exact.losses, rel=0.02)
    assert mine.norms == pytest.approx(exact.norms, rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in mine.weights.values())


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.nbytes = weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.weight.shape[0]:
            turned = out.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()
            self.nbytes = max(self.nbytes, 0 if turned else out.nbytes)
        return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_logits_stay_within_their_budget_and_cover_target_tokens_only(tokens: int) -> None:
    hp = hyperparameters()
    steps = random_steps(2, 6, 1)
    model = tiny_model("llama", torch.float32)
    oracle = run_oracle(model, hp, steps)
    budget = tokens * VOCABULARY * 4 + 3
    run = make_run(model, hp, steps, logits_bytes=budget)
    feed(run, steps)
    heads, losses = 0, []
    while (shape := run.peek()) is not None:
        if shape.kind != QuantumKind.HEAD:
            run.run(shape.rows)
        else:
            with _Largest(model.lm_head.weight) as largest:
                heads += run.run(shape.rows).tokens
            assert 0 < largest.nbytes <= budget
        losses += [m.loss for m in run.take_metrics()]
    run.release()
    assert heads == sum(step.targets for step in steps)
    assert losses == pytest.approx(oracle.losses, rel=1e-5)


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    hp = hyperparameters(gradient_accumulation_steps=2)
    silent = ([5, 6, 7, 8], [-100] * 4)
    rows = random_steps(1, 2, 1)[0].rows
    steps = [Step([silent, silent, *rows], [[0, 1], [2, 3]]), Step([*rows, silent, silent], [[0, 1], [2, 3]])]
    model = tiny_model("llama")
    mine = layer_wise(model, hp, steps, everything)
    oracle = run_oracle(model, hp, steps)
    assert mine.losses == pytest.approx(oracle.losses)
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(mine.weights[name], weight, rtol=1e-5, atol=1e-6)

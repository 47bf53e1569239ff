"""Whole training steps by our kernels, interpreted on CPU tensors, against torch's own operators;
and what a layer launches with them on a device that is none."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_harli.config import KERNEL_FAMILIES
from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.kernels.launch import through
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import RunSpec
from support.cuda.fake_cuda import fake_base, fake_cuda
from support.cuda.operation_counter import OperationCounter
from support.cuda.reference_kernels import ReferenceKernels
from support.kernels.interpreter import interpreted
from support.trainer.evaluation_feed import Validation, feed_all
from support.trainer.trainer_oracle import Step, hyperparameters, random_steps, tiny_model

ALL_ON = dict.fromkeys(KERNEL_FAMILIES, "on")
BUDGET = Path(__file__).parents[3] / "fixtures" / "launch_budget.json"


def with_switches(base: FrozenBase, switches: dict[str, str]) -> FrozenBase:
    return dataclasses.replace(base, kernels=KernelSwitches(switches))


def make_run(base: FrozenBase, *, keep: bool, **changes: Any) -> TrainingRun:
    hp = hyperparameters(**{"lora_r": 8, "lora_alpha": 12.0, **changes})
    spec = RunSpec(job="j", attempt=1, hyperparameters=hp, total_steps=2)
    return TrainingRun(base, spec, logits_bytes=1 << 14, keep_activations=keep)


@pytest.mark.parametrize(
    ("arch", "keep"), [("llama", True), ("qwen3", False)], ids=["llama-kept", "qwen3-recomputed"]
)
def test_a_run_is_torchs(arch: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of rows of several lengths, all but one at once, an evaluation, dropout."""
    monkeypatch.setattr(
        "sglang_harli.peft_trainer.base.frozen_base.operators_for", lambda device: TorchOperators(flash=True)
    )
    results, launched = [], []
    steps = random_steps(2, 3, 1, longest=9)
    for switches in ({}, ALL_ON):
        base = with_switches(from_transformers(tiny_model(arch, torch.float32, head_dim=16)), switches)
        run = make_run(base, keep=keep, lora_dropout=0.1 if keep else 0.0)
        feed_all(run, steps, Validation(steps[0].rows[:2], every=2, size=2))
        with ReferenceKernels(), interpreted() as names:
            while (shape := run.peek()) is not None:
                run.run(shape.rows if shape.fixed else max(1, shape.rows - 1))
        (evaluation,) = run.take_evaluations()
        losses = [(one.loss, one.grad_norm) for one in run.take_metrics()]
        results.append((losses, (evaluation.loss, evaluation.accuracy), dict(run.state_tensors())))
        launched.append(Counter(names))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-5)
    assert not launched[0]
    kinds = {"_rows", "_sums", "_forward", "_backward", "_rotate", "_rotate_back"}
    assert set(launched[1]) == kinds | {"_add_products", "_product_gradients"}


@pytest.mark.parametrize(("arch", "before"), [("llama", 92), ("qwen3", 114)])
def test_a_layer_launches_at_most_sixty(arch: str, before: int) -> None:
    """Forward, recompute and backward; rank 16 on all seven linears, no dropout. Kernels of ours
    are counted at their launcher, everything else by the calls of torch's operators."""
    ours: list[str] = []

    def count(kernel: Any, *_: Any) -> None:
        ours.append(kernel.fn.__name__)

    most: Counter[QuantumKind] = Counter()
    with fake_cuda(), through(count):
        base = with_switches(fake_base(arch), ALL_ON)
        run = make_run(base, keep=False, lora_r=16)
        rows = [([3] * 24, [-100] * 12 + [5] * 12)] * 3
        feed_all(run, [Step(rows, [[0, 1, 2]])] * 2, Validation(rows[:1], every=2, size=1))
        first = True
        while (shape := run.peek()) is not None and run.applied_step < 1:
            known = len(ours)
            with OperationCounter() as counter:
                run.run(shape.rows)
            if shape.kind == QuantumKind.FORWARD and first:
                first = False  # the tables of positions are made
                continue
            most[shape.kind] = max(most[shape.kind], counter.total + len(ours) - known)
    assert {"_rows", "_rotate_back", "_product_gradients"} <= set(ours)
    layer = most[QuantumKind.FORWARD] + most[QuantumKind.BACKWARD]
    assert layer <= 60 < before == json.loads(BUDGET.read_text())[arch]["layer"]
    assert most[QuantumKind.HEAD] <= 20
    print(f"{arch}: {dict(most)}")  # pytest -s: for docs/internals/training-step.md

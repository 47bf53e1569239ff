"""Every kind of quantum on a CUDA device that is none: the host never waits, and what is launched
stays within the budget (``test/fixtures/launch_budget.json``).

    python test/unit/peft_trainer/test_cuda_quanta.py      writes the budget anew; say why in the commit
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sglang_harli.config import KERNEL_FAMILIES
from sglang_harli.core import QuantumKind
from sglang_harli.device_sizes import sizes_of
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.kernels.launch import through
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import RunSpec
from support.cuda.fake_cuda import CUDA, FakeDevice, fake_base, fake_cuda
from support.cuda.host_sync import HostSyncChecker, HostWaits
from support.cuda.operation_counter import OperationCounter
from support.trainer.evaluation_feed import Validation, feed_all
from support.trainer.trainer_oracle import Step, hyperparameters

BUDGET = Path(__file__).parents[2] / "fixtures" / "launch_budget.json"
BLOCK = sizes_of("cuda").token_block
ARCHITECTURES = ("llama", "qwen3")


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_cuda() as found:
        yield found


def rows_of(*lengths: int) -> list[tuple[list[int], list[int]]]:
    return [([3] * n, [-100] * (n // 2) + [5] * (n - n // 2)) for n in lengths]


def make_run(
    arch: str,
    *,
    base: FrozenBase | None = None,
    keep: bool = False,
    micro: int = 1,
    lengths: tuple[int, ...] = (24, 17, 9),
    **hp: Any,
):
    """Two steps, and an evaluation behind the second."""
    options = hyperparameters(gradient_accumulation_steps=micro, lora_r=16, lora_alpha=32.0, **hp)
    spec = RunSpec(job="j", attempt=1, hyperparameters=options, total_steps=2)
    base = fake_base(arch) if base is None else base
    run = TrainingRun(base, spec, logits_bytes=1 << 16, keep_activations=keep)
    count = len(lengths)
    groups = [list(range(i * count, (i + 1) * count)) for i in range(micro)]
    steps = [Step(rows_of(*lengths * micro), groups)] * 2
    return run, lambda: feed_all(run, steps, Validation(rows_of(12, 7), every=2, size=2))


def quanta(run: TrainingRun, device: FakeDevice, *, cut: bool = False) -> Counter[str]:
    """All of them under the checker; ``cut``: each row in blocks of tokens."""
    seen: Counter[str] = Counter()
    with HostSyncChecker(device) as checker:
        while (shape := run.peek()) is not None:
            if cut and run.cut(shape.kind):
                continue
            done = run.run(shape.rows if shape.fixed else max(1, shape.rows - 1))
            seen[done.kind.value] += 1
    assert checker.copies > 0
    assert run.settling  # the evaluation's result is on its way, for ever
    return seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_no_quantum_waits_for_the_device(arch: str, keep: bool, device: FakeDevice) -> None:
    """With dropout and accumulation."""
    run, feed = make_run(arch, keep=keep, micro=2, lora_dropout=0.1)
    with HostSyncChecker(device):
        feed()
    others = {QuantumKind.ADAPTER, QuantumKind.CHECK}
    if not keep:  # the first rows of a layer's kind are recomputed where it keeps, too
        others.add(QuantumKind.BACKWARD_KEPT)
    assert set(quanta(run, device)) == {kind.value for kind in {*QuantumKind} - others}


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_with_kernels_of_ours_none_waits_either(keep: bool, device: FakeDevice) -> None:
    ours: list[Any] = []
    switches = KernelSwitches(dict.fromkeys(KERNEL_FAMILIES, "on"))
    base = dataclasses.replace(fake_base("qwen3"), kernels=switches)
    run, feed = make_run("qwen3", base=base, keep=keep, micro=2)
    feed()
    with through(lambda kernel, *_: ours.append(kernel)):
        assert quanta(run, device)["optimizer"]
    assert len(ours) > 100


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_in_blocks_do_not_wait_either(arch: str, device: FakeDevice) -> None:
    run, feed = make_run(arch, lengths=(2 * BLOCK + 9, BLOCK + 3), lora_dropout=0.1)
    feed()
    assert quanta(run, device, cut=True)["backward"] > 6 * 2


@pytest.mark.parametrize("micro", [1, 2])
def test_a_restored_adapter_comes_from_pageable_memory_without_a_wait(micro: int, device: FakeDevice) -> None:
    run, feed = make_run("llama", micro=micro)
    shapes = {name: tensor.shape for b in run._adapter.blocks for name, tensor in b.state}
    run.load_state(lambda name: torch.zeros(shapes[name]), {**run.state_meta(), "step": 1})
    feed()
    assert quanta(run, device)["copy"] == 3 * 7  # a pair of A and B each


def test_half_precision_scales_its_loss_without_a_wait(device: FakeDevice) -> None:
    options = hyperparameters()
    spec = RunSpec(job="j", attempt=1, hyperparameters=options, total_steps=1)
    run = TrainingRun(fake_base(dtype=torch.float16), spec, logits_bytes=1 << 16)
    feed_all(run, [Step(rows_of(9, 5), [[0, 1]])], Validation(rows_of(5), every=1, size=1))
    quanta(run, device)


def test_the_checker_refuses_what_blocks(device: FakeDevice) -> None:
    there = torch.empty(4, 6, device=CUDA)
    pinned = device.make_pinned((4, 6), torch.float32)
    with HostSyncChecker(device) as checker:
        there.copy_(pinned, non_blocking=True)
        pinned.copy_(there, non_blocking=True)
        pinned[1:3].to(CUDA, non_blocking=True)
        assert checker.copies == 3
        for wrong, why in (
            (lambda: there.copy_(pinned), "blocking"),
            (lambda: there.copy_(torch.empty(4, 6), non_blocking=True), "pageable"),
            (lambda: there.bfloat16().copy_(pinned, non_blocking=True), "converts"),
            (lambda: there[:, :3].copy_(pinned[:, :3], non_blocking=True), "layouts"),
            (lambda: torch.tensor([1.0, 2.0], device=CUDA), "blocking"),
        ):
            with pytest.raises(HostWaits, match=why):
                wrong()
        for waits in (lambda: there.sum().item(), lambda: there[there > 0], lambda: there.nonzero()):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()
        with pytest.raises(RuntimeError, match="device"):
            there + torch.empty(4, 6)


# ------------------------------------------------------------------ launches
def launches(arch: str, device: FakeDevice) -> dict[str, int]:
    """The most of each kind, of all layers; rank 16 on all seven linears, no dropout."""
    most: dict[str, int] = {}
    for keep in (False, True):
        base = fake_base(arch)
        with OperationCounter() as counter:
            run, feed = make_run(arch, base=base, keep=keep, lengths=(24, 24, 24))
        most["start"] = counter.total
        feed()
        run.run(run.peek().rows)  # type: ignore[union-attr]
        first = True
        while (shape := run.peek()) is not None:
            kind = shape.kind.value + ("_and_keep" if keep and shape.kind == QuantumKind.FORWARD else "")
            with OperationCounter() as counter:
                run.run(shape.rows)
            if shape.kind == QuantumKind.FORWARD and first:
                first = False  # the tables of positions are made
            elif run.applied_step < 1 or run.evaluating:
                most[kind] = max(most.get(kind, 0), counter.total)
        run.release()
    most["layer"] = most["forward"] + most["backward"]
    return dict(sorted(most.items()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_stay_within_their_budget(arch: str, device: FakeDevice) -> None:
    """Exactly: fewer are a new budget too."""
    assert launches(arch, device) == json.loads(BUDGET.read_text())[arch]


if __name__ == "__main__":
    found = {}
    for name in ARCHITECTURES:
        with fake_cuda() as made:
            found[name] = launches(name, made)
    BUDGET.write_text(json.dumps(found, indent=2) + "\n")

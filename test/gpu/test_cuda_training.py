"""Training on a CUDA device: the same losses as on a CPU, no waiting for the device, snapshots in
full."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sglang_harli.config import SWITCHED
from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.managers.scheduler.step_timer import BatchLoad, EventTimer
from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer, Work
from sglang_harli.managers.scheduler.training.state_copier import StateCopier, reader, state_layout
from sglang_harli.managers.scheduler.training.warm_up import CHECKS
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.graphs.graph_check import graphs_of
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.protocol.shared_memory import SharedBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

STEPS = 4
LENGTHS = [24, 17, 9]


def make_run(
    device: str, dtype: torch.dtype = torch.float32, *, keep: bool = True, kernels: str = "off"
) -> TrainingRun:
    """``kernels``: the switch of all families and of graphs."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    base = from_transformers(model.to(device=device, dtype=dtype).eval())
    base = dataclasses.replace(base, kernels=KernelSwitches(dict.fromkeys(SWITCHED, kernels)))
    hyperparameters = Hyperparameters(batch_size=3, lora_r=8, learning_rate=1e-3)
    spec = RunSpec(job="j", attempt=1, hyperparameters=hyperparameters, total_steps=STEPS)
    run = TrainingRun(base, spec, logits_bytes=1 << 16, keep_activations=keep, graphs=graphs_of)
    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        ids = rng.integers(0, 128, sum(LENGTHS), dtype=np.int32)
        cursor = BatchCursor(epoch=1, step=step, index=0)
        batch = MicroBatch(
            job="j",
            attempt=1,
            cursor=cursor,
            micro_batches=1,
            lengths=LENGTHS,
            rows=[0, 1, 2],
            step_target_tokens=sum(LENGTHS) - len(LENGTHS),
        )
        run.feed(*padded(batch, ids, ids))
    return run


def finish(run: TrainingRun, *, idle: bool = False) -> list[float]:
    """``idle``: graphs may be made."""
    while (shape := run.peek()) is not None:
        run.run(shape.rows, idle=idle)
    if run.base.device.type == "cuda":
        torch.cuda.synchronize()
    return [metrics.loss for metrics in run.take_metrics()]


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_losses_are_those_of_the_cpu(keep):
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        assert finish(make_run("cuda", keep=keep)) == pytest.approx(finish(make_run("cpu")), rel=1e-4)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_train(dtype, kernels):
    losses = finish(make_run("cuda", dtype, kernels=kernels))
    assert len(losses) == STEPS and all(np.isfinite(losses))


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_kernels_of_ours_and_graphs_give_torch_s_losses(keep):
    expected = finish(make_run("cuda", torch.bfloat16, keep=keep))
    run = make_run("cuda", torch.bfloat16, keep=keep, kernels="on")
    torch.cuda.synchronize()  # it was made on another stream
    with torch.cuda.stream(torch.cuda.Stream()):
        losses = finish(run, idle=True)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert run.graphs is not None and run.graphs.captured > 0 and run.graphs.replayed > 0
    assert not run.graphs.failed


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_family_computes_what_torch_does(check):
    base = make_run("cuda", torch.bfloat16, kernels="auto").base
    assert check(base) is None


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_no_quantum_synchronizes_with_the_device(kernels):
    run = make_run("cuda", torch.bfloat16, kernels=kernels)
    finish(make_run("cuda", torch.bfloat16, kernels=kernels))  # lazy initialization may
    torch.cuda.set_sync_debug_mode("error")
    try:
        while (shape := run.peek()) is not None:
            run.run(shape.rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_snapshot_through_pinned_memory_is_the_state(tmp_path: Path):
    run = make_run("cuda")
    finish(run)
    tensors = run.state_tensors()
    refs, nbytes = state_layout(tensors)
    slot = SharedBuffer.create(tmp_path, nbytes)
    copier = StateCopier(tensors, slot, refs)
    while not copier.done:
        copier.run()
    get = reader(slot, refs)
    for name, tensor in tensors:
        assert torch.equal(get(name), tensor.cpu()), name


def test_a_state_that_went_to_host_memory_comes_back_as_it_was():
    expected = finish(make_run("cuda", keep=False))
    run = make_run("cuda", keep=False)
    count = 0
    while (shape := run.peek()) is not None:
        run.run(shape.rows)
        count += 1
        if count % 3 == 0 and not run.spilled:
            assert run.spill()
            assert not run.state_consistent or all(not t.is_cuda for _, t in run.state_tensors())
    torch.cuda.synchronize()
    losses = [metrics.loss for metrics in run.take_metrics()]
    assert losses == pytest.approx(expected, rel=1e-5)  # kernels may add in another order


def test_queued_quanta_count_until_their_events_fire():
    stream = torch.cuda.Stream()
    clock = DeviceQuantumTimer(torch.cuda, lambda: stream)
    big = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with clock.span():
        for _ in range(20):
            big = big @ big * 1e-4
    clock.close(Work(QuantumKind.FORWARD, 10), lambda: LatencyEstimate(0.25, 0.5))
    assert clock.queued_s in (0.0, 0.5)
    torch.cuda.synchronize()
    assert clock.queued_s == 0.0
    (measured,) = clock.take()
    assert measured.work.tokens == 10 and measured.seconds > 0 and measured.launch_s > 0


def test_batches_are_timed_by_events():
    timer = EventTimer(torch.cuda, torch.cuda.current_stream())
    timer.begin()
    torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
    timer.end(BatchLoad(True, 3, 12, 3, 12))
    torch.cuda.synchronize()
    ((load, seconds),) = timer.take()
    assert load.requests == 3 and seconds > 0

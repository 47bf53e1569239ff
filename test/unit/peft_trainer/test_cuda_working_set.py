"""The bound on a quantum's memory: against what is alive at once, and when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.device_sizes import sizes_of
from sglang_harli.managers.scheduler.training.failures import describe, lacked_memory
from sglang_harli.peft_trainer.memory.working_set import QuantumBound, WorkingSet
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol import internal
from support.cuda.fake_cuda import fake_base, fake_cuda
from support.cuda.peak_memory import LittleMemory, PeakMemory
from support.trainer.co_trainer_host import Host, Peer, batch, spec, temporary_run_dir, until
from support.trainer.trainer_oracle import (
    Step,
    at_most,
    cut,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    tiny_model,
)

__all__ = ["one_thread"]  # a fixture

REAL = {  # about an 8B model's layer, and a small one's with head norms
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128},
    "qwen3": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128},
}


def fake_run(arch: str, rows: int, width: int, *, keep: bool, working: int | None = None) -> TrainingRun:
    base = fake_base(arch, num_key_value_heads=8, num_hidden_layers=2, vocab_size=1000, **REAL[arch])
    options = internal.RunSpec(job="j", attempt=1, hyperparameters=hyperparameters(lora_r=16), total_steps=1)
    run = TrainingRun(base, options, logits_bytes=1 << 22, keep_activations=keep, working_bytes=working)
    feed(run, [Step([([3] * width, [5] * width)] * rows, [list(range(rows))])])
    return run


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (40, 33)])
@pytest.mark.parametrize("arch", REAL)
def test_the_estimate_holds_what_is_alive_at_once(arch: str, rows: int, width: int, keep: bool) -> None:
    with fake_cuda():
        run = fake_run(arch, rows, width, keep=keep)
        seen = set()
        while (shape := run.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
            with PeakMemory() as memory:
                run.run(shape.rows)
            if shape.kind in (QuantumKind.COPY, QuantumKind.EMBED):
                continue
            assert run._tried is not None
            estimate, _ = run._tried
            keeps = keep and shape.kind == QuantumKind.FORWARD
            assert memory.peak <= estimate, shape.kind
            if rows * width > 3000 and not keeps and shape.kind != QuantumKind.HEAD:
                assert memory.peak > 0.4 * estimate, (shape.kind, memory.peak / estimate)
            seen.add(shape.kind)
        assert len(seen) == 3


def test_rows_offered_are_those_that_the_reserve_holds() -> None:
    block = sizes_of("cuda").token_block
    with fake_cuda():
        run = fake_run("llama", 16, 1024, keep=False, working=2**30)
        offers = {}
        while (shape := run.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
            offers.setdefault(shape.kind, shape)
            run.run(shape.rows)
        needs = WorkingSet(run.base, 16)
        for kind in (QuantumKind.FORWARD, QuantumKind.BACKWARD):
            most = (2**30 - needs.leaves) // needs.row_bytes(kind, 1024)
            assert 1 < offers[kind].rows == most < 16
        # One row that is too long by itself comes in blocks of tokens.
        long = fake_run("llama", 1, 3000, keep=False, working=2**28)
        kinds = {}
        while (shape := long.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
            with PeakMemory() as memory:
                long.run(shape.rows)
            if shape.attended:
                kinds[shape.kind] = shape
                assert shape.row_tokens == block and memory.peak <= 2**28
        assert set(kinds) == {QuantumKind.FORWARD, QuantumKind.BACKWARD}


def test_a_bound_is_halved_down_to_one_row() -> None:
    with fake_cuda():
        needs = WorkingSet(fake_base(), 16)
        bound = QuantumBound(needs, None)
        assert bound.rows(QuantumKind.BACKWARD, 100, 64) == 64
        assert not bound.too_long(QuantumKind.BACKWARD, 10**6)
        bound.halve(needs.leaves + 64 * needs.row_bytes(QuantumKind.BACKWARD, 100))
        assert 24 <= bound.rows(QuantumKind.BACKWARD, 100, 64) <= 32
        for _ in range(20):
            bound.halve(10**9)
        assert bound.rows(QuantumKind.BACKWARD, 100, 64) == bound.head_tokens(500) == 1
        assert bound.blocks(QuantumKind.BACKWARD, 64, 10_000, 9) == 1


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_where_memory_lacks_less_is_run_at_once_and_the_result_is_the_same(keep: bool) -> None:
    model, hp = tiny_model(dtype=torch.float32), hyperparameters()
    steps = [Step([([3 + i] * 40, [5] * 40) for i in range(8)], [list(range(8))])] * 2
    plain = make_run(model, hp, steps, keep=False)
    feed(plain, steps)
    expected = drive(plain, at_most(2))
    run = make_run(model, hp, steps, keep=keep)
    feed(run, steps)
    largest = 3 * 40 * 88 * 4  # of three rows, gate and up
    failed = 0
    with LittleMemory(largest) as memory:
        while (shape := run.peek()) is not None:
            try:
                run.run(shape.rows)
            except torch.OutOfMemoryError:
                failed += 1
                assert run.shrink()
    losses = [metrics.loss for metrics in run.take_metrics()]
    assert 1 <= failed == memory.refused <= 4
    assert losses == pytest.approx(expected.losses, rel=1e-5)


def test_one_row_that_has_no_room_comes_in_blocks_and_one_block_is_the_end() -> None:
    block = sizes_of("cpu").token_block
    model, hp, steps = tiny_model(dtype=torch.float32), hyperparameters(), []
    steps = [Step([([3] * (3 * block), [5] * (3 * block))], [[0]])]
    run = make_run(model, hp, steps, keep=False)
    feed(run, steps)
    seen = []
    shares = 4 * block * 3 * block * 4  # of a block of queries, with each key of the row
    with LittleMemory(shares):
        while (shape := run.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
            try:
                run.run(shape.rows)
                seen.append((shape.kind, shape.attended))
            except torch.OutOfMemoryError:
                assert run.shrink()
    assert (QuantumKind.BACKWARD, 3 * block) in seen and shape is not None

    run = make_run(model, hp, steps, keep=False)
    feed(run, steps)
    with LittleMemory(shares - 1), pytest.raises(torch.OutOfMemoryError):
        while (shape := run.peek()) is not None:
            try:
                run.run(shape.rows)
            except torch.OutOfMemoryError:
                if not run.shrink():
                    raise


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("no room"),
    ],
    ids=["torch", "pinned", "cuBLAS", "host", "lease"],
)
def test_memory_lacks_in_many_words(error: Exception) -> None:
    """Of torch's allocator, of the driver for pinned memory and graphs, of cuBLAS."""
    assert lacked_memory(error) and describe(error)[0] == "out_of_memory"
    assert not lacked_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_fixed_split_is_not_cut() -> None:
    model, hp, steps = (
        tiny_model(dtype=torch.float32),
        hyperparameters(),
        [Step([([3] * 9, [5] * 9)] * 2, [[0, 1]])],
    )
    run = make_run(model, hp, steps, rows=2)
    feed(run, steps)
    with LittleMemory(1000), pytest.raises(torch.OutOfMemoryError):
        drive(run, everything)
    assert not run.shrink() and not cut(run)


@pytest.mark.parametrize("limit", [4 * 20 * 32 * 4, 100], ids=["of one row", "of none"])
def test_a_job_fails_only_where_one_row_has_no_room(limit: int, tmp_path: Path) -> None:
    folder = temporary_run_dir(tmp_path)
    path = next(folder)
    peer, host = Peer(path), Host(path, quantum_rows=None)
    try:
        until(host, peer, lambda: peer.of(internal.Hello))
        peer.send(internal.StartRun(spec=spec(steps=1)))
        until(host, peer, lambda: peer.of(internal.RunStarted))
        with LittleMemory(limit) as memory:
            peer.send(*batch(1, lengths=(20, 20, 20, 20)))
            until(host, peer, lambda: peer.of(internal.StepDone) or peer.of(internal.RunFailed))
        assert memory.refused
        failed = peer.of(internal.RunFailed)
        assert [message.code for message in failed] == ([] if limit > 100 else ["out_of_memory"])
    finally:
        host.link.close()
        peer.socket.close()
    next(folder, None)

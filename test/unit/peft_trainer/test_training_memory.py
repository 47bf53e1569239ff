"""Training's memory: what is asked for and when, what is given back, and that no weight shows any
of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.architectures import ALL_LINEAR
from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.device_sizes import SIZES
from sglang_harli.errors import StateError
from sglang_harli.managers.scheduler.training.state_copier import StateCopier, reader, state_layout
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from sglang_harli.peft_trainer.memory.layout import memory_layout, state_dtypes
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.job_limits import MemoryLayout, ServedLimits
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.train_memory import carved_bytes
from support.trainer.poisoned_memory import PoisonedMemory
from support.trainer.trainer_oracle import (
    Step,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    random_steps,
    tiny_model,
)

__all__ = ["one_thread"]  # a fixture

HP = hyperparameters(gradient_accumulation_steps=2, lora_dropout=0.1, weight_decay=0.1)
STEPS = random_steps(4, 3, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEPT, MICRO, STATE = MemoryPurpose.KEPT, MemoryPurpose.MICRO_BATCH, MemoryPurpose.STATE


def saved(run: TrainingRun) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = {name: tensor.clone() for name, tensor in run.state_tensors()}
    return state, json.loads(json.dumps(run.state_meta()))


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def one_layer_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer applies a step in several quanta."""
    monkeypatch.setitem(SIZES, "cpu", dataclasses.replace(SIZES["cpu"], optimizer_elements=1))


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[dict[torch.dtype, Any]]:
    """The state after ``STEPS`` with a fixed split, by dtype, in plain memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ends = {}
    for dtype in DTYPES:
        run = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2)
        feed(run, STEPS)
        drive(run, everything)
        ends[dtype] = saved(run)
        run.release()
    torch.set_num_threads(threads)
    yield ends


def disturbed_run(dtype: torch.dtype, memory: PoisonedMemory) -> TrainingRun:
    run = make_run(tiny_model("llama", dtype), HP, STEPS, rows=2, memory=memory)
    feed(run, STEPS)
    return run


# ------------------------------------------------------------------ no trace in the weights
@pytest.mark.parametrize("dtype", DTYPES)
def test_undefined_contents_are_never_read(dtype: torch.dtype, undisturbed: dict[torch.dtype, Any]) -> None:
    memory = PoisonedMemory()
    run = disturbed_run(dtype, memory)
    assert not memory.asked  # only when it is needed
    losses = drive(run, everything).losses
    end = saved(run)
    assert len(losses) == len(STEPS) and end[1] == undisturbed[dtype][1]
    assert_identical(end[0], undisturbed[dtype][0])
    run.release()
    assert not memory.held


def test_padding_is_finite_wherever_later_ranges_are_cut_wider() -> None:
    """Forward row by row, backward all at once: columns are read that no forward has computed."""
    steps = random_steps(3, 5, 1)
    losses = []
    for memory in (PoisonedMemory(), None):
        run = make_run(tiny_model("mistral"), hyperparameters(), steps, memory=memory, keep=False)
        feed(run, steps)
        found = []
        while (shape := run.peek()) is not None:
            run.run(1 if shape.kind == QuantumKind.FORWARD else shape.rows)
            found += [m.loss for m in run.take_metrics()]
        losses.append(found)
        run.release()
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_spilled_at_every_boundary(dtype: torch.dtype, undisturbed: dict[torch.dtype, Any]) -> None:
    memory = PoisonedMemory()
    run = disturbed_run(dtype, memory)
    kinds: dict[QuantumKind, int] = {}
    while (shape := run.peek()) is not None:
        done = run.run(shape.rows)
        kinds[done.kind] = kinds.get(done.kind, 0) + 1
        before = saved(run) if run.state_consistent else None
        assert run.spill() and run.spilled
        assert not memory.bytes_of(STATE) and not run.spill()
        if before is not None:  # a checkpoint can be taken from host memory
            assert_identical(saved(run)[0], before[0])
        back = 0
        while run.spilled and run.peek() is not None:
            assert run.run(1).kind == QuantumKind.COPY
            back += 1
            if back == 1 and kinds[done.kind] % 3 == 0:  # and again, half of it back
                assert run.spill() and run.spilled
    assert run.finished and kinds[QuantumKind.OPTIMIZER] == 4 * len(STEPS)
    assert {QuantumKind.ACCUMULATE, QuantumKind.HEAD, QuantumKind.BACKWARD} <= kinds.keys()
    assert_identical(saved(run)[0], undisturbed[dtype][0])
    run.release()
    assert not memory.held


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_dropped_at_ever_later_quanta(
    dtype: torch.dtype, undisturbed: dict[torch.dtype, Any]
) -> None:
    memory = PoisonedMemory()
    run = disturbed_run(dtype, memory)
    limit, count = 1, 0
    while (shape := run.peek()) is not None:
        run.run(shape.rows)
        run.drop_unused()
        if (count := count + 1) == limit and limit < 40:
            run.drop_micro_batch()
            assert not memory.bytes_of(MICRO) and not run.drop_micro_batch()
            if limit % 2:
                run.spill()
            limit, count = limit + 1, 0
    assert run.finished and limit > 15
    assert_identical(saved(run)[0], undisturbed[dtype][0])
    run.release()
    assert not memory.held


def test_a_copy_of_the_state_goes_on_while_it_is_spilled_and_comes_back(tmp_path: Path) -> None:
    memory = PoisonedMemory()
    steps = random_steps(2, 2, 1)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(lora_r=1024), steps, memory=memory)
    feed(run, steps)
    drive(run, everything, until=1)
    expected = saved(run)[0]
    tensors = run.state_tensors()
    refs, nbytes = state_layout(tensors)
    slot = SharedBuffer.create(tmp_path, nbytes)
    copier = StateCopier(tensors, slot, refs)
    moves = 0
    while not copier.done:
        copier.run()
        moves += 1
        if moves == 1:
            run.spill()
        elif moves == 2:
            run.run(run.peek().rows)  # type: ignore[union-attr]  # one layer back
    assert moves >= 3
    get = reader(slot, refs)
    assert all(torch.equal(get(name), tensor) for name, tensor in expected.items())
    run.release()
    slot.unlink()


# ------------------------------------------------------------------ waiting
def test_a_run_waits_for_memory_and_says_for_what() -> None:
    allowed: set[MemoryPurpose] = set()
    memory = PoisonedMemory(lambda purpose, _: purpose in allowed)
    steps = random_steps(2, 3, 1)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory)
    assert run.peek() is None and run.needs_memory is not None
    purpose, state_bytes = run.needs_memory
    assert purpose == STATE and state_bytes == memory.asked[-1][1] > 0
    with pytest.raises(StateError, match="waits for memory"):
        run.run(1)
    allowed.add(STATE)
    drive(run, everything)
    assert run.ready and run.peek() is None and run.needs_memory is None  # it is data that it waits for
    feed(run, steps)
    assert run.peek() is None and run.needs_memory == memory.asked[-1]
    assert memory.asked[-1][0] == MICRO
    allowed.add(MICRO)
    shape = run.peek()
    assert shape is not None and shape.kind == QuantumKind.EMBED and run.needs_memory is None
    assert run.drop_unused() and not memory.bytes_of(MICRO)
    drive(run, everything, until=1)
    assert run.spill()
    allowed.remove(STATE)
    assert run.peek() is None and run.needs_memory == (STATE, state_bytes)
    assert run.at_step_boundary and len(run.state_tensors()) > 0
    allowed.add(STATE)
    drive(run, everything)
    assert run.finished and run.peek() is None and run.needs_memory is None
    run.release()
    run.release()
    assert not memory.held


def test_a_spill_without_host_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_harli.peft_trainer.memory import adapter_state

    memory = PoisonedMemory()
    steps = random_steps(1, 2, 1)
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory)
    assert not run.spill() and not run.drop_unused() and not run.drop_kept() and not run.drop_micro_batch()
    feed(run, steps)
    run.run(run.peek().rows)  # type: ignore[union-attr]

    def none_left(flat: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(adapter_state, "_host_like", none_left)
        assert not run.spill() and not run.spilled and memory.bytes_of(STATE)
    drive(run, everything)
    assert run.finished
    run.release()


def test_the_space_of_a_micro_batch_serves_the_next_ones_that_fit() -> None:
    memory = PoisonedMemory()
    rows = [([1] * n, [1] * n) for n in (9, 9, 5, 5)]
    steps = [Step(rows[:2], [[0, 1]]), Step(rows[2:], [[0, 1]]), Step(rows, [[0, 1, 2, 3]])]
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory, keep=False)
    feed(run, steps)
    drive(run, everything)
    asked = [nbytes for purpose, nbytes in memory.asked if purpose == MICRO]
    assert len(asked) == 2 and asked[0] < asked[1]  # the second one lies in the first one's
    assert run.drop_unused() and not run.drop_unused()
    run.release()


def test_training_mode_does_not_leak_into_what_is_spilled() -> None:
    """Pressure comes inside SGLang's inference mode, whose tensors could not be trained on."""
    steps = random_steps(2, 2, 1)
    model = tiny_model(dtype=torch.float32)
    with torch.inference_mode():
        run = make_run(model, hyperparameters(), steps, memory=PoisonedMemory())
        feed(run, steps)
        drive(run, everything, until=1)
        assert run.spill()
        assert not any(tensor.is_inference() for _, tensor in run.state_tensors())
        assert len(drive(run, everything).losses) == 1
        run.release()


# ------------------------------------------------------------------ how much
def limits_of(base: FrozenBase, logits_bytes: int, **changes: Any) -> ServedLimits:
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_path": "m",
        "tokenizer_path": "m",
        "served_model_name": "m",
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": "cpu",
        "vocab_size": base.config.vocab_size,
        "hidden_size": base.config.hidden_size,
        "num_layers": base.config.num_hidden_layers,
        "linear_sizes": base.linear_sizes(),
        "max_seq_length": 512,
        "max_lora_rank": 64,
        "lora_target_modules": ALL_LINEAR,
        "train_memory_bytes": 1 << 40,
        "logits_bytes": logits_bytes,
        "layout": memory_layout(base, logits_bytes),
    }
    return ServedLimits(**(values | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_bytes", [700, 1 << 20])
@pytest.mark.parametrize(("batch_size", "rows"), [(3, 3), (3, 8), (4096, 3)])
def test_a_jobs_memory_is_what_its_run_asks_for(
    dtype: torch.dtype, logits_bytes: int, batch_size: int, rows: int
) -> None:
    for options in ({}, {"gradient_accumulation_steps": 2, "target_modules": ("q_proj", "up_proj")}):
        hp = hyperparameters(batch_size=batch_size, lora_r=5, **options)
        row = [7] * 11
        batch = min(batch_size, rows)
        steps = [Step([(row, row)] * batch, [list(range(batch))])]
        memory, model = PoisonedMemory(), tiny_model(dtype=dtype)
        limits = limits_of(from_transformers(model), logits_bytes)
        run = make_run(model, hp, steps, memory=memory, logits_bytes=logits_bytes, keep=False)
        feed(run, steps)
        drive(run, everything)
        assert [purpose for purpose, _ in memory.asked] == [STATE, MICRO]
        assert limits.job_memory_bytes(hp, len(row), rows) == sum(nbytes for _, nbytes in memory.asked)
        run.release()


@given(
    memory_bytes=st.integers(0, 1 << 22),
    space_bytes=st.sampled_from([1, 4096, 100_000]),
    longest=st.integers(1, 400),
    rank=st.integers(1, 64),
)
def test_the_largest_batch_fits_and_the_next_one_does_not(
    memory_bytes: int, space_bytes: int, longest: int, rank: int
) -> None:
    limits = ServedLimits(
        architecture="LlamaForCausalLM",
        model_path="m",
        tokenizer_path="m",
        served_model_name="m",
        dtype="bfloat16",
        device="cpu",
        vocab_size=400,
        hidden_size=64,
        num_layers=2,
        linear_sizes=dict.fromkeys(ALL_LINEAR, (64, 64)),
        max_seq_length=512,
        max_lora_rank=64,
        lora_target_modules=ALL_LINEAR,
        train_memory_bytes=memory_bytes // space_bytes * space_bytes,
        logits_bytes=1 << 16,
        layout=MemoryLayout(
            parameter_bytes=(4, 2, 4, 4, 4),
            accumulated_bytes=4,
            inputs=4,
            input_bytes=2,
            logit_bytes=(4, 2),
            head_tokens=(1 << 16) // 1600,
        ),
        space_bytes=space_bytes,
    )

    def needs(batch: int) -> int:
        return limits.job_memory_bytes(Hyperparameters(batch_size=batch, lora_r=rank), longest, batch)

    largest = limits.largest_batch(Hyperparameters(lora_r=rank), longest)
    assert needs(largest + 1) > limits.train_memory_bytes
    assert largest == 0 or needs(largest) <= limits.train_memory_bytes
    assert needs(1) % space_bytes == 0


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_names_the_tensors_that_a_layer_has(dtype: torch.dtype, accumulates: bool) -> None:
    hp = hyperparameters(gradient_accumulation_steps=2 if accumulates else 1)
    run = make_run(tiny_model(dtype=dtype), hp, STEPS)
    for block in run._adapter.blocks:
        assert tuple(flat.dtype for flat in block.flats) == state_dtypes(dtype, accumulates=accumulates)
    run.release()


def test_heap_memory_has_a_budget() -> None:
    memory = HeapMemory(torch.device("cpu"), 1000)
    specs = [((100,), torch.uint8), ((3, 5), torch.float64)]
    assert sum(carved_bytes(shape, dtype) for shape, dtype in specs) == 512
    space = memory.obtain(STATE, specs)
    assert space is not None and memory.used == 512 and memory.obtain(KEPT, specs) is None
    first, second = (space.carve(shape, dtype) for shape, dtype in specs)
    assert second.data_ptr() - first.data_ptr() == 256 and second.shape == (3, 5)
    with pytest.raises(MemoryError, match="no room for 8 bytes in a lease of 512, 512 of them carved"):
        space.carve((1,), torch.float64)
    space.give_back()
    space.give_back()
    assert memory.used == 0
    with pytest.raises(MemoryError):
        space.carve((1,), torch.uint8)


def test_a_lease_serves_tensors_that_are_no_larger() -> None:
    lease = HeapMemory(torch.device("cpu")).obtain(KEPT, [((300,), torch.uint8), ((4,), torch.float32)])
    assert lease is not None and lease.asked_bytes == 768
    assert lease.holds([((128,), torch.float32), ((2, 3), torch.float64)])
    assert not lease.holds([((129,), torch.float32), ((1,), torch.float32)])
    assert not lease.holds([((1,), torch.float32)])
    one, two = lease.carve_all([((2, 50), torch.bfloat16), ((2, 3), torch.float64)])
    assert one.shape == (2, 50) and two.data_ptr() - one.data_ptr() == 512
    lease.give_back()


def test_a_job_whose_adapter_is_in_the_mlp_alone() -> None:
    """Nothing before the first layer's MLP is differentiated."""
    steps = random_steps(1, 2, 1)
    hp = hyperparameters(target_modules=("gate_proj", "up_proj", "down_proj"))
    for keep in (False, True):
        run = make_run(tiny_model(), hp, steps, keep=keep)
        feed(run, steps)
        assert len(drive(run, everything).losses) == 1
        run.release()


def test_weights_of_a_waiting_run_take_no_memory() -> None:
    base = from_transformers(tiny_model(dtype=torch.float32))
    before = {p.data_ptr() for p in base.model.parameters()}
    run = make_run(base.model, hyperparameters(lora_r=300), STEPS)
    own = [t for t in base.model.parameters() if t.data_ptr() not in before]
    own += [tensor for block in run._adapter.blocks for tensor in block.flats]
    assert own and all(tensor.untyped_storage().nbytes() <= 8 for tensor in own)
    assert sum(tensor.nbytes for block in run._adapter.blocks for _, tensor in block.state) > 1_000_000
    run.release()

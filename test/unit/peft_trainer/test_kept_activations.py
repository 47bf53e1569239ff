"""Kept activations: the oracle's numbers whatever is kept or dropped, and no byte that the memory
does not know."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.errors import StateError
from sglang_harli.peft_trainer.layers.attention import LONG_BLOCK, SHORT
from sglang_harli.peft_trainer.memory import kept_activations
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

KEPT = MemoryPurpose.KEPT
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lora_dropout": 0.2,
        "use_rslora": True,
    },
    "attention only": {"target_modules": ("k_proj", "o_proj")},
    "mlp only": {"target_modules": ("gate_proj", "down_proj"), "lora_dropout": 0.1},
}


class Moods:
    """Grants kept memory, or not, for whole stretches; what else is asked for it always grants."""

    def __init__(self, seed: int, share: float) -> None:
        self.random, self.share = random.Random(seed), share
        self.granted = self.refused = 0

    def __call__(self, purpose: MemoryPurpose, _nbytes: int) -> bool:
        if purpose != KEPT:
            return True
        grant = self.random.random() < self.share
        self.granted, self.refused = self.granted + grant, self.refused + (not grant)
        return grant


def compare(mine: Outcome, oracle: Outcome) -> None:
    assert mine.losses == pytest.approx(oracle.losses, rel=1e-9)
    assert mine.norms == pytest.approx(oracle.norms, rel=1e-7)
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(mine.weights[name], weight, rtol=1e-5, atol=1e-6)


def run_moody(run: TrainingRun, seed: int) -> tuple[Outcome, dict[QuantumKind, int]]:
    """Random splits; now and then what is kept is dropped, a range or all, or with the whole
    micro-batch."""
    rng, outcome, kinds = random.Random(seed), Outcome(), dict.fromkeys(QuantumKind, 0)
    while (shape := run.peek()) is not None:
        chance = rng.random()
        if chance < 0.03:
            run.drop_micro_batch()
        elif chance < 0.06:
            run.drop_kept()
        elif chance < 0.08:
            run.spill()
        elif chance < 0.12:
            run.drop_unused()
        elif chance < 0.2 and shape.kind == QuantumKind.BACKWARD_KEPT:
            cut(run)
            recomputed = run.peek()
            assert recomputed is not None and recomputed.kind == QuantumKind.BACKWARD
            assert recomputed.rows >= shape.rows and not recomputed.fixed
        shape = run.peek()
        assert shape is not None
        done = run.run(shape.rows if shape.fixed else rng.randint(1, shape.rows))
        kinds[done.kind] += 1
        for metrics in run.take_metrics():
            outcome.losses.append(metrics.loss)
            outcome.norms.append(metrics.grad_norm)
    outcome.weights = weights(run)
    return outcome, kinds


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arch", EXTRA)
def test_double_precision_equals_the_oracle(arch: str, options: dict[str, Any]) -> None:
    hp = hyperparameters(**options)
    steps = random_steps(8, 4, hp.gradient_accumulation_steps)
    model = tiny_model(arch)
    oracle = run_oracle(model, hp, steps)
    for seed, share in ((1, 1.0), (2, 0.8)):
        moods = Moods(seed, share)
        memory = PoisonedMemory(moods)
        run = make_run(model, hp, steps, memory=memory)
        feed(run, steps)
        outcome, kinds = run_moody(run, seed)
        assert run.finished and kinds[QuantumKind.BACKWARD_KEPT] > 5 and kinds[QuantumKind.BACKWARD] > 3
        assert moods.granted and bool(moods.refused) == (share < 1)
        compare(outcome, oracle)
        run.release()
        assert not memory.held


def test_nothing_is_recomputed_where_there_is_memory() -> None:
    hp = hyperparameters(lora_dropout=0.1)
    steps = random_steps(3, 4, 1)
    model = tiny_model()
    run = make_run(model, hp, steps, memory=PoisonedMemory())
    feed(run, steps)
    recomputed, kinds = 0, set()
    while (shape := run.peek()) is not None:
        first = run.applied_step == 0
        done = run.run(shape.rows if shape.fixed else min(3, shape.rows))
        if first:
            recomputed += done.rows * (done.kind == QuantumKind.BACKWARD)
        else:
            kinds.add(done.kind)
    assert QuantumKind.BACKWARD_KEPT in kinds and QuantumKind.BACKWARD not in kinds
    assert 0 < recomputed <= 6  # the first rows of each kind of layer are for measuring
    run.release()


@pytest.mark.parametrize("leases", [None, 1, 2])
def test_slotting_no_lease_comes_or_goes_within_a_quantum(
    leases: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quanta stand in a stream's span, leases edit lists of another stream."""
    if leases is not None:
        monkeypatch.setitem(kept_activations.LEASES, "cpu", leases)
    steps = random_steps(4, 4, 1)
    memory = PoisonedMemory()
    model = tiny_model(num_hidden_layers=3)
    run = make_run(model, hyperparameters(), steps, memory=memory)
    feed(run, steps)
    kept = most = 0
    while (shape := run.peek()) is not None:
        asked, held = len(memory.asked), list(memory.held)
        done = run.run(shape.rows if shape.fixed else min(2, shape.rows))
        assert len(memory.asked) == asked and memory.held == held, done.kind
        kept += done.kind == QuantumKind.BACKWARD_KEPT
        most = max(most, sum(lease.purpose == KEPT for lease in held))
    assert run.finished and kept > 10 and most == (leases or 3)
    run.release()
    assert not memory.held


@pytest.mark.parametrize("arch", ["mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_every_attention_kernel(arch: str, dtype: torch.dtype) -> None:
    hp = hyperparameters()
    steps = random_steps(2, 2, 1, longest=SHORT) + random_steps(2, 2, 1, seed=2, longest=2 * SHORT)
    oracle = run_oracle(tiny_model(arch), hp, steps)
    memory = PoisonedMemory()
    run = make_run(tiny_model(arch, dtype), hp, steps, memory=memory)
    feed(run, steps)
    exact = dtype == torch.float64
    losses = drive(run, everything).losses
    assert losses == pytest.approx(oracle.losses, rel=1e-9 if exact else 0.02)
    if exact:
        for name, weight in weights(run).items():
            torch.testing.assert_close(weight, oracle.weights[name], rtol=1e-5, atol=1e-6)
    assert any(purpose == KEPT for purpose, _ in memory.asked)
    run.release()


def test_single_precision_first_gradients() -> None:
    hp = hyperparameters(gradient_accumulation_steps=2, max_grad_norm=0.0, lora_dropout=0.1)
    steps = random_steps(2, 3, 2)
    model = tiny_model("qwen2", torch.float32)
    oracle = run_oracle(model, hp, steps)
    run = make_run(model, hp, steps)
    feed(run, steps)
    while (shape := run.peek()) is not None and shape.kind != QuantumKind.OPTIMIZER:
        run.run(shape.rows)
    for block in run._adapter.blocks:
        for matrix in block.matrices:
            expected = oracle.first_grads[matrix.key]
            assert (matrix.of(block.grad) - expected).norm() <= 1e-5 * expected.norm(), matrix.key
    run.release()


def test_a_kept_range_is_run_as_it_was_kept_or_recomputed_in_any_split() -> None:
    rows = [([3] * n, [3] * n) for n in (12, 9, 9, 5, 4)]
    steps = [Step(rows, [[0, 1, 2, 3, 4]])] * 3
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps)
    feed(run, steps)
    drive(run, everything, until=1)  # what the layers need is known

    def until(kind: QuantumKind, most: int) -> None:
        while (shape := run.peek()) is not None and shape.kind != kind:
            run.run(shape.rows if shape.fixed else min(most, shape.rows))

    until(QuantumKind.BACKWARD_KEPT, 2)  # forward by 2, 2 and 1 rows
    shape = run.peek()
    assert shape is not None and (shape.rows, shape.row_tokens, shape.fixed) == (2, 12, True)
    with pytest.raises(StateError, match="1 rows asked"):
        run.run(1)
    assert run.run(2).tokens == 24
    cut(run)  # the next two rows are recomputed, one by one; the last one is kept still
    shape = run.peek()
    assert shape is not None and (shape.kind, shape.rows, shape.fixed) == (QuantumKind.BACKWARD, 2, False)
    assert not cut(run)  # it is not kept, and its rows are short
    assert [run.run(1).tokens, run.run(1).tokens] == [9, 5]
    shape = run.peek()
    assert shape is not None and (shape.kind, shape.rows) == (QuantumKind.BACKWARD_KEPT, 1)
    run.run(1)
    assert run.drop_kept() and not run.drop_kept()  # the layer below: all of it in one piece
    shape = run.peek()
    assert shape is not None and (shape.kind, shape.rows) == (QuantumKind.BACKWARD, 5)
    drive(run, everything)
    assert run.finished
    run.release()


def test_no_more_is_dropped_than_is_needed() -> None:
    """The layers that are needed last go first; what is left is used."""
    steps = random_steps(3, 4, 1)
    model = tiny_model(num_hidden_layers=3)
    oracle = run_oracle(model, hyperparameters(), steps)
    memory = PoisonedMemory()
    run = make_run(model, hyperparameters(), steps, memory=memory)
    feed(run, steps)
    losses, order = [], []
    while (shape := run.peek()) is not None:
        if shape.kind == QuantumKind.HEAD and run.applied_step == 1:
            spaces = [space for space in memory.held if space.purpose == KEPT]
            assert run._kept is not None
            by_layer = [group.lease for group in run._kept._groups]
            assert len(spaces) == 3 and set(spaces) == set(by_layer)
            assert run.drop_kept(lambda: len(memory.held) <= 2 + 2)
            assert {space for space in memory.held if space.purpose == KEPT} == set(by_layer[1:])
            assert not run.drop_kept(lambda: True)
        second = run.applied_step == 1
        done = run.run(shape.rows if shape.kind != QuantumKind.FORWARD else min(2, shape.rows))
        losses += [metrics.loss for metrics in run.take_metrics()]
        if second and done.kind in (QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT):
            order.append((done.kind == QuantumKind.BACKWARD_KEPT, done.rows))
    assert order == [(True, 2)] * 4 + [(False, 4)]
    assert losses == pytest.approx(oracle.losses, rel=1e-9)
    run.release()


def test_a_spill_ends_what_is_kept() -> None:
    """The kept graphs know the weights by where they lay."""
    steps = random_steps(2, 3, 1)
    model = tiny_model()
    oracle = run_oracle(model, hyperparameters(), steps)
    memory = PoisonedMemory()
    run = make_run(model, hyperparameters(), steps, memory=memory)
    feed(run, steps)
    losses = []
    while (shape := run.peek()) is not None:
        if shape.kind == QuantumKind.BACKWARD_KEPT:
            assert memory.bytes_of(KEPT)
            assert run.spill() and not memory.bytes_of(KEPT)
            shape = run.peek()
            assert shape is not None and shape.kind == QuantumKind.COPY
        assert shape.kind != QuantumKind.BACKWARD_KEPT
        run.run(shape.rows)
        losses += [metrics.loss for metrics in run.take_metrics()]
    assert losses == pytest.approx(oracle.losses, rel=1e-9)
    run.release()


def test_a_fixed_split_and_a_switch_keep_nothing() -> None:
    steps = random_steps(1, 3, 1)
    for options in ({"rows": 2}, {"keep": False}):
        memory = PoisonedMemory()
        run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory, **options)
        feed(run, steps)
        drive(run, everything)
        assert run.finished and all(purpose != KEPT for purpose, _ in memory.asked)
        assert not run.drop_kept()
        run.release()


def test_a_refusal_ends_keeping_for_one_micro_batch() -> None:
    """Each micro-batch asks again, and where memory is short only once."""
    asked: list[int] = []

    def grants(purpose: MemoryPurpose, nbytes: int) -> bool:
        if purpose == KEPT:
            asked.append(nbytes)
        return purpose != KEPT

    rows = [([3] * 9, [3] * 9)] * 3
    steps = [Step(rows, [[0, 1, 2]])] * 4
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=PoisonedMemory(grants))
    feed(run, steps)
    drive(run, everything)
    assert run.finished and len(asked) == len(steps) - 1 and len(set(asked)) == 1  # the first measures
    run.release()


def test_spaces_serve_the_next_micro_batches_and_go_when_those_do_not_need_them() -> None:
    long, short = [([3] * 16, [3] * 16)] * 2, [([3] * 12, [3] * 12)] * 2
    steps = [Step(rows, [[0, 1]]) for rows in (long, long, long, short, long)]
    memory = PoisonedMemory()
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory)
    feed(run, steps)
    drive(run, everything, until=2)
    asked = [nbytes for purpose, nbytes in memory.asked if purpose == KEPT]
    assert len(asked) == 2  # one a layer
    drive(run, everything, until=5)
    assert [nbytes for purpose, nbytes in memory.asked if purpose == KEPT] == asked
    feed(run, steps)
    before = memory.bytes_of(KEPT)
    assert before == sum(asked)
    assert run.drop_unused() and not memory.bytes_of(KEPT)
    run.release()

    memory = PoisonedMemory()  # much shorter rows, once and again: less is held for them
    shortest = [([3] * 5, [3] * 5)] * 2
    steps = [Step(rows, [[0, 1]]) for rows in (long, long, shortest, shortest, shortest)]
    run = make_run(tiny_model(dtype=torch.float32), hyperparameters(), steps, memory=memory)
    feed(run, steps)
    held = []
    for step in range(1, 6):
        drive(run, everything, until=step)
        held.append(memory.bytes_of(KEPT))
    assert held[0] == 0 < held[1] == held[2] and 0 < 2 * held[3] < held[2] and held[3] == held[4]
    run.release()


def test_what_there_is_memory_for_is_kept() -> None:
    """Of three layers' leases two are refused: the layer whose backward comes first is kept."""
    rows = [([3] * 9, [3] * 9)] * 3
    steps = [Step(rows, [[0, 1, 2]])] * 3
    memory = PoisonedMemory(lambda purpose, nbytes: purpose != KEPT or not memory.bytes_of(KEPT))
    model = tiny_model(dtype=torch.float32, num_hidden_layers=3)
    run = make_run(model, hyperparameters(), steps, memory=memory)
    feed(run, steps)
    drive(run, everything, until=1)
    kinds = []
    while (shape := run.peek()) is not None:
        done = run.run(shape.rows)
        if done.kind in (QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT):
            kinds.append(done.kind)
    assert kinds == [QuantumKind.BACKWARD_KEPT, QuantumKind.BACKWARD, QuantumKind.BACKWARD] * 2
    run.release()


class _Storages(TorchDispatchMode):
    """Weak references to the memory of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.found[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr())
        return out

    def alive(self) -> list[tuple[int, int]]:
        """(address, bytes) of what is still there."""
        found = []
        for reference, address in self.found.values():
            if not reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                found.append((address, storage.nbytes()))
        return found


@pytest.mark.parametrize("arch", EXTRA)
@pytest.mark.parametrize("longest", [SHORT // 2, 2 * SHORT])
def test_autograd_holds_no_memory_of_its_own(arch: str, longest: int) -> None:
    hp = hyperparameters(lora_dropout=0.1)
    rows = [([3] * n, [3] * n) for n in (longest, longest, longest // 2)]
    steps = [Step(rows, [[0, 1, 2]])] * 2
    memory = PoisonedMemory()
    model = tiny_model(arch, torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    run = make_run(model, hp, steps, memory=memory)
    feed(run, steps)
    drive(run, everything, until=1)  # tables and caches are there
    while run.peek().kind != QuantumKind.FORWARD:  # type: ignore[union-attr]
        run.run(run.peek().rows)  # type: ignore[union-attr]
    with _Storages() as storages:
        while run.peek().kind == QuantumKind.FORWARD:  # type: ignore[union-attr]
            run.run(run.peek().rows)  # type: ignore[union-attr]
    kept_bytes = memory.bytes_of(KEPT)
    spaces = memory.addresses
    stray = [
        (address, nbytes)
        for address, nbytes in storages.alive()
        if address not in own and not any(address in space for space in spaces)
    ]
    assert kept_bytes > 100_000
    # What outlives the micro-batch: cosines and sines, and the mask of a block of queries.
    tables = 2 * longest * 12 * 2 + 4 * LONG_BLOCK * LONG_BLOCK
    assert sum(nbytes for _, nbytes in stray) < tables + 2_000 < kept_bytes / 5, stray
    assert run.drop_kept() and not memory.bytes_of(KEPT)
    drive(run, everything)
    assert run.finished
    run.release()

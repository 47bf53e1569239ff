"""A run that is taken up again, from any place within a step, ends at the same bits as one that
never stopped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.data.batches import BatchOrder, total_steps
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
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

HP = hyperparameters(
    gradient_accumulation_steps=3,
    lora_dropout=0.2,
    weight_decay=0.1,
    lr_scheduler="cosine",
    warmup_ratio=0.4,
    max_grad_norm=0.5,
)
STEPS = random_steps(5, 2, 3)


def state(run: TrainingRun) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As it travels: plain tensors and a document."""
    tensors = {name: tensor.clone() for name, tensor in run.state_tensors()}
    return tensors, json.loads(json.dumps(run.state_meta()))


def taken_up(model, steps: list[Step], saved: tuple[dict[str, torch.Tensor], dict[str, Any]]):
    tensors, meta = saved
    run = make_run(model, HP, steps, rows=1)
    run.load_state(tensors.__getitem__, meta)
    feed(run, steps, start=meta["step"] + 1)
    losses = drive(run, everything).losses
    end = state(run)
    run.release()
    return end, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_every_place_within_an_accumulating_step(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    run = make_run(model, HP, STEPS, rows=1)
    if dtype == torch.float16:
        run._optimizer.scale.fill_(2.0**22)  # the first steps overflow: the scale and Adam's count are state
    feed(run, STEPS)
    losses = drive(run, everything, until=2).losses
    found: dict[int, Any] = {}  # by the micro-batches of step 3 that were done
    while run.applied_step == 2:
        run.run(run.peek().rows)  # type: ignore[union-attr]
        if run.applied_step == 2 and run.state_consistent:
            found[run._index] = state(run)
    assert set(found) == {0, 1, 2, 3}  # before the first, between, and when the optimizer is about to begin
    losses += drive(run, everything).losses
    whole = state(run)
    run.release()
    for saved in found.values():
        assert saved[1]["step"] == 2
        (tensors, meta), again = taken_up(model, STEPS, saved)
        assert meta == whole[1]
        assert again[-2:] == losses[-2:]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in whole[0].items())


def test_the_order_of_the_data_over_epochs_is_the_same_from_any_step(tmp_path) -> None:
    from sglang_harli.service.rows.encoder import Row

    with TokenWriter(tmp_path) as writer:
        for number in range(11):
            ids = list(range(number, number + 3))
            writer.append(Row(ids, [False, True, True]), number + 1)
    hp = hyperparameters(n_epochs=3, batch_size=2, gradient_accumulation_steps=2, seed=5)

    def order(step: int) -> list[tuple[int, int, int, tuple[int, ...]]]:
        feeder = BatchOrder(TokenReader(tmp_path), hp)
        cursor, seen = feeder.cursor_after(step), []
        while cursor.step <= feeder.total_steps:
            batch = feeder.batch(cursor)
            seen.append((cursor.epoch, cursor.step, cursor.index, tuple(batch.data.ids.ravel().tolist())))
            cursor = feeder.following(cursor)
        return seen

    whole = order(0)
    assert total_steps(11, hp) == 9 and [row[1] for row in whole][-1] == 9
    for step in range(1, 9):
        assert order(step) == [row for row in whole if row[1] > step]
    epochs = [sorted(np.concatenate([r[3] for r in whole if r[0] == epoch])) for epoch in (1, 2, 3)]
    assert epochs[0] == epochs[1] == epochs[2]  # every row once an epoch
    assert [r[3] for r in whole if r[0] == 1] != [r[3] for r in whole if r[0] == 2]  # in another order


def test_a_new_course_begins_with_the_adapter_and_nothing_else(tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    first = make_run(model, HP, STEPS, rows=1)
    feed(first, STEPS)
    drive(first, everything)
    tensors, _ = state(first)
    first.release()
    (tmp_path / "step-5").mkdir()
    save_file({name: t.numpy() for name, t in tensors.items()}, tmp_path / "step-5" / "state.safetensors")
    checkpoints.save_beginning(tmp_path / "step-5", tmp_path / "step-0", seed=77)
    slot, ref, meta, _ = checkpoints.load_state(tmp_path, 0, tmp_path / "shm")
    saved = {
        t.name: torch.tensor(np.frombuffer(slot.view(t), np.float32).reshape(t.shape)) for t in ref.tensors
    }
    slot.unlink()
    run = make_run(model, hyperparameters(seed=77, gradient_accumulation_steps=3), STEPS, rows=1)
    run.load_state(saved.__getitem__, meta)
    drive(run, everything)
    began, about = state(run)
    assert (about["step"], about["tokens"], run.next_cursor.step) == (0, 0, 1)
    for name, tensor in began.items():
        assert torch.equal(tensor, tensors[name]) if name.startswith("adapter/") else not tensor.any()
    feed(run, STEPS)
    assert len(drive(run, everything).losses) == len(STEPS)
    run.release()

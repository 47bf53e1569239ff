"""The learning rate: by default every step learns, a warm-up is transformers' own, stored jobs keep
theirs."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from sglang_harli.peft_trainer.schedule import LearningRate
from sglang_harli.protocol.public import SCHEDULERS, Hyperparameters

KINDS = st.sampled_from(SCHEDULERS)
TOTALS = st.integers(1, 400)
# As the first version stored every job: all hyperparameters, its default warm-up among them.
STORED = (
    b'{"n_epochs":3,"learning_rate":0.0002,"lr_scheduler":"linear","warmup_ratio":0.03,"batch_size":4,'
    b'"gradient_accumulation_steps":1,"lora_r":16,"lora_alpha":32.0,"lora_dropout":0.0,"use_rslora":false,'
    b'"target_modules":["q_proj","v_proj"],"max_seq_length":null,"weight_decay":0.0,"max_grad_norm":1.0,'
    b'"checkpoint_every":50,"seed":42,"on_overflow":"error"}'
)


def rates(total: int, **values) -> list[float]:
    rate = LearningRate(Hyperparameters(**values), total)
    return [rate.at(step) for step in range(1, total + 1)]


@given(KINDS, TOTALS)
def test_by_default_every_step_learns_and_the_first_one_most(kind, total):
    found = rates(total, lr_scheduler=kind, learning_rate=0.5)
    assert found[0] == 0.5
    assert all(0 < rate <= 0.5 for rate in found)
    if kind == "constant":
        assert set(found) == {0.5}


@given(KINDS, st.floats(0, 1))
def test_a_run_of_one_step_learns_whatever_the_warm_up(kind, ratio):
    assert rates(1, lr_scheduler=kind, warmup_ratio=ratio, learning_rate=0.5) == [0.5]


@given(KINDS, TOTALS, st.floats(0, 1))
def test_a_warm_up_rises_evenly_and_ends_before_the_last_step(kind, total, ratio):
    found = rates(total, lr_scheduler=kind, warmup_ratio=ratio, learning_rate=1.0)
    warm = min(math.ceil(ratio * total), total - 1)
    assert found[:warm] == [step / warm for step in range(warm)]
    assert found[warm] == 1.0


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("total", [2, 3, 34, 100, 1000])
def test_stored_jobs_keep_their_schedule(kind, total):
    """Bit for bit what transformers' scheduler gives an optimizer that it steps."""
    stored = msgspec.json.decode(STORED, type=Hyperparameters)
    assert stored.warmup_ratio == 0.03
    hp = msgspec.structs.replace(stored, lr_scheduler=kind)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=hp.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=math.ceil(0.03 * total), num_training_steps=total
    )
    expected = []
    for _ in range(total):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert [LearningRate(hp, total).at(step) for step in range(1, total + 1)] == expected
    assert expected[0] == 0.0

"""The tiny run before a server is healthy: every kind of quantum, and no trace of it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.managers.scheduler.training.warm_up import (
    CHECKS,
    WIDTHS,
    WarmUp,
    _on,
    wanted,
    warm_up,
)
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.base.first_layers import first_layers
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from support.pool_parts import small_pool
from support.trainer.trainer_oracle import one_thread, tiny_model

__all__ = ["one_thread"]  # a fixture


def base_of(arch: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> FrozenBase:
    return from_transformers(tiny_model(arch, dtype, **changes))


def warm(base: FrozenBase, folder: Path, **given: Any) -> WarmUp:
    return warm_up(base, **{"logits_bytes": 1 << 16, "slots": folder, "widths": (80, 24)} | given)


def bits(base: FrozenBase) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in base.model.named_parameters()}


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("mistral", torch.float16)]
)
def test_every_kind_of_quantum_of_a_job_runs(arch: str, dtype: torch.dtype, tmp_path: Path):
    done = warm(base_of(arch, dtype, num_hidden_layers=3), tmp_path / "slots")
    assert not done.failure and not done.notes
    of_a_run = set(QuantumKind) - {QuantumKind.ADAPTER, QuantumKind.CHECK}
    assert set(done.quanta) == of_a_run
    assert done.seconds > 0 and not list((tmp_path / "slots").iterdir())


def test_it_changes_nothing_of_what_serves_or_trains_later(tmp_path: Path):
    base = base_of(num_hidden_layers=3)
    before = bits(base)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    grad = torch.is_grad_enabled()
    assert not warm(base, tmp_path / "slots").failure
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.is_grad_enabled() == grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.named_parameters())
    assert len(base.layers) == base.config.num_hidden_layers == 3


GEOMETRY = PoolGeometry(slots=64 * 300 + 17, row_bytes=256, buffers=4, page_size=1, stripe_slots=64)


@pytest.mark.parametrize("make", [HostBacking, lambda geometry: StaticBacking(geometry, "cpu")])
@pytest.mark.parametrize("fails", [False, True])
def test_the_pool_has_all_its_memory_back(make: Any, fails: bool, tmp_path: Path):
    pool, slots, _ = small_pool(GEOMETRY, backing=make(GEOMETRY))
    free = set(slots.free)
    lacking = {"slots": tmp_path / "no" / "folder"} if fails else {}
    done = warm(base_of(), tmp_path / "slots", memory=TrainArena(pool), **lacking)
    assert bool(done.failure) == fails and done.quanta[QuantumKind.BACKWARD_KEPT]
    assert pool.status()["moves"]["to_train"] > 0  # it was asked
    assert not pool.leases and not pool.train_stripes and not pool.backing.lent
    assert slots.free == free
    assert not any(bool(pool.backing.kv_bytes(buffer).any()) for buffer in range(GEOMETRY.buffers))
    pool.check()


def test_on_a_device_all_of_its_streams_are_done_at_the_end(monkeypatch: pytest.MonkeyPatch):
    """The pool's lists of slots are edited on another one."""
    steps: list[Any] = []

    @contextlib.contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        steps.append(stream)
        yield
        steps.append("back")

    monkeypatch.setattr(device_calls, "on_stream", on_stream)
    monkeypatch.setattr(device_calls, "synchronize", steps.append)
    device = torch.device("cuda", 1)
    with _on(device, "forwards"):
        steps.append("work")
    assert steps == ["forwards", "work", "back", device]


def test_where_there_is_no_memory_it_says_which_is_lacking(tmp_path: Path):
    done = warm(base_of(), tmp_path / "slots", memory=HeapMemory(torch.device("cpu"), 1000))
    assert "bytes for" in done.failure and "are not available" in done.failure


def test_it_runs_inside_inference_mode_as_in_the_scheduler(tmp_path: Path):
    base = base_of()
    with torch.inference_mode():
        assert not warm(base, tmp_path / "slots").failure


def test_weights_that_are_not_finite_do_not_stop_it(tmp_path: Path):
    base = base_of()
    with torch.no_grad():
        base.model.lm_head.weight.fill_(float("nan"))
    assert not warm(base, tmp_path / "slots").failure


def test_rows_are_no_longer_than_the_model_has_positions(tmp_path: Path):
    base = base_of(max_position_embeddings=40)
    assert not warm(base, tmp_path / "slots", widths=WIDTHS).failure


def test_what_fails_is_one_sentence_and_raises_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    done = warm(base_of(), tmp_path / "slots", logits_bytes=4)
    assert "--harli-logits-mem 4 bytes" in done.failure
    (record,) = [record for record in caplog.records if "warm" in record.message]
    assert record.levelname == "WARNING" and record.exc_info is None and "\n" not in record.message


def test_how_long_it_took_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    warm(base_of(), tmp_path / "slots")
    (record,) = [record for record in caplog.records if "warmed up in" in record.message]
    assert record.levelname == "INFO"


def test_a_comparison_that_differs_or_raises_is_a_note_and_the_others_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    asked: list[str] = []

    def agrees(base: FrozenBase) -> str | None:
        asked.append("agrees")
        return None

    def raises(base: FrozenBase) -> str | None:
        asked.append("raises")
        raise RuntimeError("no such kernel")

    def differs(base: FrozenBase) -> str | None:
        asked.append("differs")
        return "SwiGLU differs from torch's by 3%: torch's own is used"

    done = warm(base_of(), tmp_path / "slots", checks=(raises, agrees, differs))
    assert asked == ["raises", "agrees", "differs"] and not done.failure
    assert done.notes == [
        "raises could not be compared with torch (RuntimeError: no such kernel)",
        "SwiGLU differs from torch's by 3%: torch's own is used",
    ]
    assert all(any(note in record.message for record in caplog.records) for note in done.notes)


def test_a_server_on_a_cpu_does_not_unless_it_is_asked_to():
    assert [wanted(option, "cpu") for option in ("auto", "on", "off")] == [False, True, False]
    assert [wanted(option, "cuda") for option in ("auto", "on", "off")] == [True, True, False]


def test_what_is_compared_holds_on_a_cpu_too():
    assert [note for check in CHECKS if (note := check(base_of(dtype=torch.bfloat16)))] == []


def test_first_layers_share_the_modules_and_leave_the_base_alone():
    base = base_of(num_hidden_layers=3)
    two = first_layers(base, 2)
    assert len(two.layers) == 2 and len(base.layers) == 3
    assert two.layers[0] is base.layers[0] and two.model.lm_head is base.model.lm_head
    assert two.model.model.embed_tokens is base.model.model.embed_tokens

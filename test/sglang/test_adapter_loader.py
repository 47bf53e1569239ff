"""An adapter goes from shared memory into SGLang's LoRA serving, slice by slice."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_harli.managers.scheduler import control
from sglang_harli.managers.scheduler.training import adapter_loader
from sglang_harli.managers.scheduler.training.adapter_loader import AdapterLoader
from sglang_harli.protocol.internal import SlotRef, TensorRef
from sglang_harli.protocol.shared_memory import SharedBuffer, layout

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]


@pytest.fixture
def fill_slot(tmp_path):
    """``fill_slot(tensors) -> (Slot, SlotRef)``: tensors as the finetune service writes them."""
    slots: list[SharedBuffer] = []

    def fill(tensors) -> tuple[SharedBuffer, SlotRef]:
        described = [
            (name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes)
            for name, t in tensors.items()
        ]
        refs, nbytes = layout(described)
        folder = (
            Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) / f"harli-test-{os.getpid()}"
        )
        slot = SharedBuffer.create(folder, nbytes)
        slots.append(slot)
        for ref, tensor in zip(refs, tensors.values(), strict=True):
            slot.view(ref)[:] = tensor.contiguous().numpy().tobytes()
        return slot, slot.ref(refs)

    yield fill
    for slot in slots:
        slot.unlink()
    for folder in {Path(slot.path).parent for slot in slots}:
        folder.rmdir()


def finish(loader: AdapterLoader) -> int:
    slices = 0
    while loader.pending:
        loader.run_slice()
        slices += 1
        assert slices < 1000
    return slices


def begin(loader: AdapterLoader, adapter, slot: SlotRef, name: str | None = None) -> str:
    lora_id = uuid.uuid4().hex
    loader.begin(lora_id, name or f"a-{lora_id}", adapter.config, slot)
    return lora_id


@pytest.fixture(scope="module")
def path(tiny_model):
    return tiny_model("qwen3", head_dim=24, intermediate_size=333, vocab_size=250)


@pytest.fixture(scope="module")
def runner(sglang_runner, path):
    return sglang_runner(path, enable_lora=True)


@pytest.fixture(scope="module")
def adapter(peft_adapter, path):
    return peft_adapter(path)


SLICE = 4096  # so that this small adapter has many


@pytest.fixture
def loader(runner, monkeypatch):
    monkeypatch.setattr(adapter_loader, "SLICE_BYTES", SLICE)
    loader = AdapterLoader(runner.lora_manager)
    yield loader
    for lora_id in list(runner.lora_manager.loras):
        loader.unload(lora_id)


def test_served_adapter_answers_as_under_peft_after_its_slot_was_reused(
    runner, loader, adapter, fill_slot, greedy_tokens
):
    slot, ref = fill_slot(adapter.tensors)
    lora_id = begin(loader, adapter, ref)
    slices = finish(loader)
    slot.buffer[:] = b"\x7f" * slot.nbytes
    assert loader.status(lora_id) == {"state": "loaded", "error": "", "passing": False, "slices": slices}
    answers = greedy_tokens(runner, PROMPTS, 8, [lora_id] * 2)
    assert answers == adapter.greedy(PROMPTS, 8) != greedy_tokens(runner, PROMPTS, 8)


def test_a_slice_is_bounded_by_its_bytes(runner, loader, adapter, fill_slot, monkeypatch):
    """Every byte is copied once, in slices of less than twice ``SLICE_BYTES``, and stacked once;
    tensors larger than a slice are cut, small ones share one."""
    assert min(t.nbytes for t in adapter.tensors.values()) < SLICE / 2
    assert max(t.nbytes for t in adapter.tensors.values()) > 2 * SLICE
    total = sum(t.nbytes for t in adapter.tensors.values())
    begin(loader, adapter, fill_slot(adapter.tensors)[1])
    assert total / (2 * SLICE) < finish(loader) <= 2 * total / SLICE + 2
    monkeypatch.setattr(adapter_loader, "SLICE_BYTES", 4 * total)
    begin(loader, adapter, fill_slot(adapter.tensors)[1])
    assert finish(loader) == 1


def test_adapters_that_requests_wait_for_come_first(loader, adapter, fill_slot):
    ref = fill_slot(adapter.tensors)[1]
    calm, urgent = uuid.uuid4().hex, uuid.uuid4().hex
    loader.begin(calm, "calm", adapter.config, ref, urgent=False)
    loader.run_slice()
    assert loader.pending and not loader.urgent
    loader.begin(urgent, "urgent", adapter.config, ref)
    assert loader.urgent
    while loader.urgent:
        loader.run_slice()
    assert [loader.status(one)["state"] for one in (urgent, calm)] == ["loaded", "loading"]
    loader.urge(calm)
    assert loader.urgent
    finish(loader)
    assert loader.status(calm)["state"] == "loaded" and not loader.urgent


def test_weights_are_those_of_sglangs_own_call(runner, loader, adapter, fill_slot):
    import torch
    from sglang.srt.lora.lora_registry import LoRARef

    lora_id = begin(loader, adapter, fill_slot(adapter.tensors)[1])
    finish(loader)
    own = LoRARef(lora_id="own", lora_name="own", lora_path="__tensor__", pinned=False)
    assert runner.load_lora_adapter_from_tensors(own, adapter.tensors, adapter.config).success
    ours, theirs = runner.lora_manager.loras[lora_id], runner.lora_manager.loras["own"]
    assert ours.scaling == theirs.scaling and ours.config.r == theirs.config.r
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert list(mine.weights) == list(other.weights)
        for name, weight in mine.weights.items():
            assert torch.equal(weight, other.weights[name])


def test_weights_take_the_base_models_dtype(
    sglang_runner, tiny_model, peft_adapter, fill_slot, greedy_tokens
):
    import torch

    path = tiny_model(dtype="bfloat16", intermediate_size=333)
    runner = sglang_runner(path, enable_lora=True)
    loader, adapter = AdapterLoader(runner.lora_manager), peft_adapter(path)
    assert {t.dtype for t in adapter.tensors.values()} == {torch.float32}
    lora_id = begin(loader, adapter, fill_slot(adapter.tensors)[1])
    finish(loader)
    weights = [w for layer in runner.lora_manager.loras[lora_id].layers for w in layer.weights.values()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert greedy_tokens(runner, PROMPTS, 4, [lora_id] * 2) != greedy_tokens(runner, PROMPTS, 4)


def test_rank_stabilized_config_keeps_its_scaling(
    runner, loader, peft_adapter, path, fill_slot, greedy_tokens
):
    adapter = peft_adapter(path, alpha=4, use_rslora=True)
    lora_id = begin(loader, adapter, fill_slot(adapter.tensors)[1])
    finish(loader)
    assert runner.lora_manager.loras[lora_id].scaling == pytest.approx(4 / 8**0.5)
    assert greedy_tokens(runner, PROMPTS, 6, [lora_id] * 2) == adapter.greedy(PROMPTS, 6)


def test_repeating_a_begin_changes_nothing(runner, loader, adapter, fill_slot):
    ref = fill_slot(adapter.tensors)[1]
    lora_id = begin(loader, adapter, ref, "again")
    loader.run_slice()
    loader.begin(lora_id, "again", adapter.config, ref)
    finish(loader)
    first = runner.lora_manager.loras[lora_id]
    loader.begin(lora_id, "again", adapter.config, ref)
    assert not loader.pending and runner.lora_manager.loras[lora_id] is first


def test_name_loaded_under_an_older_id_moves_to_the_new_one(runner, loader, adapter, fill_slot):
    ref = fill_slot(adapter.tensors)[1]
    older = begin(loader, adapter, ref, "moved")
    finish(loader)
    newer = begin(loader, adapter, ref, "moved")
    assert loader.status(newer)["state"] == "loading"
    finish(loader)
    assert loader.status(newer)["state"] == "loaded" and older not in runner.lora_manager.loras


def test_unload_ends_a_loading_and_frees_a_loaded_adapter(runner, loader, adapter, fill_slot):
    ref = fill_slot(adapter.tensors)[1]
    loading, loaded = begin(loader, adapter, ref), begin(loader, adapter, ref)
    loader.run_slice()
    loader.unload(loading)
    finish(loader)
    assert loader.status(loading)["state"] == "failed" and loader.status(loaded)["state"] == "loaded"
    loader.unload(loaded)
    loader.unload(loaded)
    assert loaded not in runner.lora_manager.loras and loaded not in runner.lora_manager.configs


def test_a_loading_is_abandoned_and_what_is_loaded_stays(runner, loader, adapter, fill_slot):
    ref = fill_slot(adapter.tensors)[1]
    loaded = begin(loader, adapter, ref)
    finish(loader)
    half = begin(loader, adapter, ref)
    loader.run_slice()
    for lora_id in (half, loaded, "never"):
        loader.abandon(lora_id)
    assert not loader.pending and loader.status(half)["state"] == "failed"
    assert loader.status(loaded)["state"] == "loaded"


def _beyond(ref: SlotRef) -> SlotRef:
    first = ref.tensors[0]
    moved = TensorRef(first.name, first.dtype, first.shape, ref.nbytes, first.nbytes)
    return SlotRef(path=ref.path, nbytes=ref.nbytes, tensors=[moved, *ref.tensors[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config, ref: ({**config, "r": 64}, ref),
            "r is 64, and this server takes at most 16: start it with --max-lora-rank 64",
        ),
        (lambda config, ref: ({**config, "peft_type": "IA3"}, ref), "accepted: LORA"),
        (lambda config, ref: ({**config, "use_dora": True}, ref), "DoRA"),
        (lambda config, ref: ({**config, "rank_pattern": {"q_proj": 4}}, ref), "one rank"),
        (lambda config, ref: ({**config, "r": 4}, ref), "at rank 4 needs"),
        (lambda config, ref: ({**config, "target_modules": ["q_proj"]}, ref), "not of the target modules"),
        (lambda config, ref: ({"r": 8}, ref), "lacks lora_alpha, target_modules"),
        (lambda config, ref: ({**config, "r": "8"}, ref), "r is '8'; accepted: numbers"),
        (lambda config, ref: ({**config, "alpha_pattern": {"q_proj": 1}}, ref), "alpha_pattern"),
        (lambda config, ref: ([], ref), "not an object"),
        (lambda config, ref: (config, SlotRef(path="/dev/shm/gone", nbytes=64, tensors=ref.tensors)), "gone"),
        (lambda config, ref: (config, SlotRef(path=ref.path, nbytes=ref.nbytes)), "no LoRA weights"),
        (lambda config, ref: (config, _beyond(ref)), "does not lie in its slot"),
    ],
)
def test_an_adapter_that_cannot_be_served_fails_with_a_reason(
    change, message, runner, loader, adapter, fill_slot
):
    config, ref = change(adapter.config, fill_slot(adapter.tensors)[1])
    loader.begin("bad", "bad", config, ref)
    finish(loader)
    status = loader.status("bad")
    assert status["state"] == "failed" and message in status["error"]
    assert status["passing"] == (message == "gone")  # the service fills another slot
    assert "bad" not in runner.lora_manager.loras and "bad" not in runner.lora_manager.configs
    assert loader.status("never")["state"] == "failed"


def test_an_error_that_nobody_expects_is_this_adapters_alone(runner, loader, adapter, fill_slot, monkeypatch):
    ref = fill_slot(adapter.tensors)[1]
    bad, good = begin(loader, adapter, ref), begin(loader, adapter, ref)
    with monkeypatch.context() as patch:
        patch.setattr(type(runner.lora_manager), "validate_new_adapter", lambda *args: {}["nothing"])
        while loader.status(bad)["state"] == "loading":
            loader.run_slice()
    assert "KeyError" in loader.status(bad)["error"]
    finish(loader)
    assert loader.status(good)["state"] == "loaded"


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("harli/load_adapter", {}),
        ("harli/load_adapter", {"slot": 5, "lora_id": 1, "lora_name": None, "config": []}),
        (
            "harli/load_adapter",
            {"slot": {"path": "/x", "nbytes": 1}, "lora_id": [], "lora_name": 1, "config": 1},
        ),
        ("harli/load_status", {"lora_id": {}}),
        ("harli/load_status", None),
        ("harli/abandon_adapter", {}),
        ("harli/none", {}),
    ],
)
def test_a_call_that_makes_no_sense_is_answered(method, body, loader):
    from sglang.srt.managers.io_struct import DumperControlReqInput

    answer = control.answer(
        SimpleNamespace(loader=loader), DumperControlReqInput(method=method, body=body or {})
    )
    assert not answer.success and answer.error

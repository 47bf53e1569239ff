"""Checkpoints: what is there is whole, what is torn is not taken, and PEFT's format is PEFT's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.publish.peft_config import adapter_config

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
RUN = {"step": 3, "generator": b"\x00\x01\xff", "seed": 2**62, "rate": 0.1 + 0.2, "cursor": {"epoch": 1}}


@pytest.fixture
def shm(tmp_path):
    return tmp_path / "shm"


def state(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {KEY: (4, 6), KEY.replace("lora_A", "lora_B"): (6, 4)}
    return {
        f"{kind}/{name}": rng.standard_normal(shape, dtype=np.float32)
        for kind in ("adapter", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def slot_of(tensors: dict[str, np.ndarray], shm):
    refs, nbytes = shared_memory.layout((n, t.dtype.name, t.shape, t.nbytes) for n, t in tensors.items())
    slot = shared_memory.SharedBuffer.create(shm, nbytes)
    for ref in refs:
        slot.view(ref)[:] = tensors[ref.name].tobytes()
    return slot.ref(refs)


def read(ref) -> dict[str, np.ndarray]:
    slot = shared_memory.SharedBuffer.open(ref)
    return {t.name: np.frombuffer(slot.view(t), dtype=t.dtype).reshape(t.shape).copy() for t in ref.tensors}


def test_a_state_comes_back_bit_for_bit(tmp_path, shm):
    folder = tmp_path / "checkpoints"
    checkpoints.save_state(folder, 3, slot_of(state(), shm), RUN, tokens=77)
    _, ref, run, tokens = checkpoints.load_state(folder, 3, shm)
    assert (run, tokens) == (RUN, 77)
    back = read(ref)
    assert back.keys() == state().keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in state().items())
    assert checkpoints.steps(folder) == [3]
    assert not (folder / "step-3" / "adapter").exists()
    assert not list(folder.glob("*.tmp"))


def test_saving_a_step_again_replaces_it(tmp_path, shm):
    folder = tmp_path / "checkpoints"
    checkpoints.save_state(folder, 3, slot_of(state(0), shm), RUN, tokens=1)
    checkpoints.save_state(folder, 3, slot_of(state(1), shm), RUN, tokens=2)
    _, ref, _, tokens = checkpoints.load_state(folder, 3, shm)
    assert tokens == 2
    assert np.array_equal(read(ref)[f"adapter/{KEY}"], state(1)[f"adapter/{KEY}"])


def test_the_newest_two_are_kept_and_what_a_crash_left_goes(tmp_path, shm):
    folder = tmp_path / "checkpoints"
    for step in (2, 10, 9):
        checkpoints.save_state(folder, step, slot_of(state(), shm), RUN, tokens=step)
    (folder / "step-11.tmp").mkdir()
    checkpoints.prune(folder)
    assert checkpoints.steps(folder) == [9, 10]
    assert not (folder / "step-11.tmp").exists()


def test_as_many_are_kept_as_asked_and_the_beginning_stays(tmp_path, shm):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        checkpoints.save_state(folder, step, slot_of(state(), shm), RUN, tokens=step)
    checkpoints.save_beginning(folder / "step-4", folder / "step-0", seed=9)
    for name in ("step-2.bad", "step-9.bad"):
        (folder / name).mkdir()
    checkpoints.prune(folder, 3)
    assert checkpoints.steps(folder) == [0, 2, 3, 4]
    assert [p.name for p in folder.glob("*.bad")] == ["step-9.bad"]  # newer than any whole one
    slot, _, run, tokens = checkpoints.load_state(folder, 0, shm)
    slot.unlink()
    assert (run["seed"], run["step"], tokens) == (9, 0, 0)


@pytest.mark.parametrize("name", ["state.safetensors", "run.msgpack", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_not_taken(tmp_path, shm, name, damage):
    folder = tmp_path / "checkpoints"
    checkpoints.save_state(folder, 3, slot_of(state(), shm), RUN, tokens=1)
    path = folder / "step-3" / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="step-3"):
        checkpoints.load_state(folder, 3, shm)


def test_a_slot_that_is_gone_is_an_error_and_leaves_no_checkpoint(tmp_path, shm):
    folder = tmp_path / "checkpoints"
    ref = slot_of(state(), shm)
    shared_memory.remove_stale(shm)
    with pytest.raises(OSError, match="slot-"):
        checkpoints.save_state(folder, 3, ref, RUN, tokens=1)
    assert checkpoints.steps(folder) == []


def test_the_adapter_has_pefts_form(tmp_path, shm):
    folder, adapter = tmp_path / "checkpoints", tmp_path / "adapter"
    checkpoints.save_state(folder, 3, slot_of(state(), shm), RUN, tokens=1)
    config = adapter_config(Hyperparameters(lora_r=4, lora_alpha=8), "/models/base")
    for _ in range(2):  # may be repeated
        checkpoints.save_adapter(adapter, folder, 3, config)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved.keys() == {KEY, KEY.replace("lora_A", "lora_B")}
    assert np.array_equal(saved[KEY], state()[f"adapter/{KEY}"])
    assert json.loads((adapter / "adapter_config.json").read_text()) == config
    _, ref, again = checkpoints.load_adapter(adapter, shm)
    assert again == config
    assert np.array_equal(read(ref)[KEY], saved[KEY])


def test_a_missing_adapter_is_named(tmp_path, shm):
    with pytest.raises(CheckpointError, match="adapter"):
        checkpoints.load_adapter(tmp_path / "adapter", shm)

"""The patches of SGLang's LoRA serving, on a real model of its CPU engine."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from sglang_harli.patches import catalog
from sglang_harli.patches.lora import gate, pin_memory
from sglang_harli.sglang_versions import supported
from sglang_harli.sglang_versions.current import lora_gate
from support.model_runner import NEWEST

PATCHES = Path(__file__).parents[2] / "patches"
PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(runner, adapter) -> tuple[str, object]:
    """Load an adapter's folder as /load_lora_adapter does."""
    from sglang.srt.lora.lora_registry import LoRARef

    lora_id = uuid.uuid4().hex
    ref = LoRARef(lora_id=lora_id, lora_name=f"a-{lora_id}", lora_path=adapter.folder, pinned=False)
    return lora_id, runner.load_lora_adapter(ref)


# ------------------------------------------------------------------ the diffs
def diffs(version: str) -> list[str]:
    return sorted(path.stem for path in (PATCHES / version).glob("*.diff"))


@pytest.mark.parametrize("patch", catalog.ALL)
def test_diff_applies_to_the_installed_sglang(patch, tmp_path):
    import sglang

    source = Path(sglang.__file__).parent
    diff = (PATCHES / supported.installed() / f"{patch}.diff").read_text()
    targets = re.findall(r"^\+\+\+ b/python/sglang/(\S+)", diff, re.MULTILINE)
    assert targets
    for target in targets:
        copy = tmp_path / "python" / "sglang" / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((source / target).read_bytes())
    subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=tmp_path, input=diff, text=True, check=True)
    for target in targets:
        changed = (tmp_path / "python" / "sglang" / target).read_text()
        assert changed != (source / target).read_text()
        compile(changed, target, "exec")


@pytest.mark.parametrize("page", sorted(PATCHES.glob("*.md")), ids=lambda path: path.stem)
def test_page_says_versions_reason_and_end(page):
    text = page.read_text()
    versions = re.search(r"- \*\*Version:\*\* SGLang ([\d., and]*[\d])[ :,(]", text)
    needed = [version for version in supported.SUPPORTED if page.stem in diffs(version)]
    assert versions and sorted(re.findall(r"[\d.]+\d", versions[1])) == sorted(needed)
    for heading in ("## Why a hook is not enough", "## When it can go"):
        assert heading in text


def test_every_patch_of_the_installed_sglang_has_its_diff():
    assert diffs(supported.installed()) == list(catalog.ALL)


def test_every_page_has_a_diff_and_every_diff_a_page():
    assert sorted(path.name for path in PATCHES.iterdir() if path.is_dir()) == sorted(supported.SUPPORTED)
    pages = {path.stem for path in PATCHES.glob("*.md")}
    assert pages == {name for version in supported.SUPPORTED for name in diffs(version)}


# ------------------------------------------------------------------ 01 pinned memory
def test_pageable_torch_ignores_pinning_and_leaves_torch_alone():
    import torch

    before = torch.tensor
    proxy = pin_memory.pageable_torch()
    made = proxy.tensor([3, 1], dtype=torch.int32, pin_memory=True)
    assert made.tolist() == [3, 1] and made.pin_memory() is made
    assert proxy.unique_consecutive(made, return_inverse=True)[1].pin_memory().tolist() == [0, 1]
    assert type(made + 1) is torch.Tensor and proxy.int32 is torch.int32
    assert torch.tensor is before


def test_lora_serving_starts_on_the_cpu(sglang_runner, tiny_model, greedy_tokens):
    path = tiny_model()
    plain = greedy_tokens(sglang_runner(path), PROMPTS, 6)
    assert greedy_tokens(sglang_runner(path, enable_lora=True), PROMPTS, 6) == plain


# ------------------------------------------------------------------ 02 gate
def test_wrappers_compute_only_for_batches_with_an_adapter(
    sglang_runner, tiny_model, greedy_tokens, peft_adapter, monkeypatch
):
    from sglang.srt.lora.backend import torch_backend

    calls = []
    forward = torch_backend.sgemm_lora_a_fwd
    monkeypatch.setattr(
        torch_backend, "sgemm_lora_a_fwd", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    path = tiny_model()
    runner = sglang_runner(path, enable_lora=True)
    adapter = peft_adapter(path)
    lora_id, result = load(runner, adapter)
    assert result.success
    plain = greedy_tokens(runner, PROMPTS, 4)
    assert calls == []
    mixed = greedy_tokens(runner, PROMPTS, 4, [None, lora_id])
    assert calls != []
    assert mixed == [plain[0], adapter.greedy(PROMPTS, 4)[1]]
    calls.clear()
    assert greedy_tokens(runner, PROMPTS, 4) == plain and calls == []


def test_batch_without_adapter_runs_the_operations_of_plain_serving(sglang_runner, tiny_model, greedy_tokens):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    recorded = []
    for options in ({}, {"enable_lora": True}):
        runner = sglang_runner(tiny_model(), **options)
        greedy_tokens(runner, PROMPTS, 2)  # what is made once
        seen: list[str] = []
        with Recorder():
            greedy_tokens(runner, PROMPTS, 4)
        recorded.append(seen)
    assert recorded[0] == recorded[1]


def capture_variant(name: str) -> Any:
    from sglang.srt.model_executor.runner_utils import capture_mode

    if NEWEST:
        return capture_mode.capture_lora_variant(name)
    stack = contextlib.ExitStack()
    capture_mode._set_capture_lora_variant(name)
    stack.callback(capture_mode._set_capture_lora_variant, None)
    return stack


def test_gate_is_open_while_graphs_with_lora_are_captured(sglang_runner, tiny_model, greedy_tokens):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner_utils import capture_mode

    def is_idle(*lora_ids: str | None) -> bool:
        return gate._is_idle(
            runner.lora_manager, SimpleNamespace(lora_ids=list(lora_ids), forward_mode=ForwardMode.DECODE)
        )

    runner = sglang_runner(tiny_model(), enable_lora=True)
    greedy_tokens(runner, PROMPTS, 2)
    wrapper = next(iter(runner.lora_manager.lora_modules[0].values()))
    assert not lora_gate.is_active(wrapper)
    assert vars(wrapper)["base_layer"] is wrapper.get_submodule("base_layer")
    runner.lora_manager.lora_backend.batch_info = SimpleNamespace(has_active_lora=False)  # of a capture
    with capture_mode.model_capture_mode():
        assert lora_gate.is_active(wrapper)
        assert not is_idle(None)
        with capture_variant("nolora"):
            assert not lora_gate.is_active(wrapper)
    assert not lora_gate.is_active(wrapper)
    assert is_idle(None, None)
    assert not is_idle(None, "some")


class Stop(Exception):
    """A capture has begun."""


def test_decode_graphs_are_captured_with_and_without_lora(sglang_runner, tiny_model):
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner
    from sglang.srt.model_executor.runner_utils import capture_mode

    def stop() -> None:
        raise Stop

    runner = sglang_runner(tiny_model(), enable_lora=True)
    if NEWEST:
        assert decode_cuda_graph_runner._lora_backend_skips_inactive(runner)
        return
    graphs = SimpleNamespace(model_runner=runner, warmup=stop, record_nolora_graph=False)
    with pytest.raises(Stop):
        decode_cuda_graph_runner.DecodeCudaGraphRunner.capture(graphs)
    assert graphs.record_nolora_graph and capture_mode.get_capture_lora_variant() is None


# ------------------------------------------------------------------ 03 padded MLP
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_adapter_of_a_padded_mlp_answers_as_under_peft(
    arch, sglang_runner, tiny_model, greedy_tokens, peft_adapter
):
    path = tiny_model(arch, intermediate_size=333, vocab_size=250)
    runner = sglang_runner(path, enable_lora=True)
    assert runner.model_config.hf_config.intermediate_size == 352
    adapter = peft_adapter(path)
    lora_id, result = load(runner, adapter)
    assert result.success, result.error_message
    answers = greedy_tokens(runner, PROMPTS, 8, [lora_id, lora_id])
    assert answers == adapter.greedy(PROMPTS, 8) != greedy_tokens(runner, PROMPTS, 8)


def test_adapter_given_at_start_up_is_padded(sglang_runner, tiny_model, greedy_tokens, peft_adapter):
    path = tiny_model(intermediate_size=333)
    adapter = peft_adapter(path)
    runner = sglang_runner(path, enable_lora=True, lora_paths=[f"first={adapter.folder}"])
    (lora_id,) = runner.lora_manager.loras
    assert greedy_tokens(runner, PROMPTS, 4, [lora_id] * 2) == adapter.greedy(PROMPTS, 4)


def test_adapter_of_another_model_is_refused_when_loaded(sglang_runner, tiny_model, peft_adapter):
    runner = sglang_runner(tiny_model(intermediate_size=333), enable_lora=True)
    before = dict(runner.lora_manager.configs)
    _, result = load(runner, peft_adapter(tiny_model(intermediate_size=320)))
    assert not result.success
    assert "(8, 320), but the served model at rank 8 needs (8, 333)" in result.error_message
    assert runner.lora_manager.configs == before


def test_adapter_of_another_model_at_start_up_stops_the_start(sglang_runner, tiny_model, peft_adapter):
    adapter = peft_adapter(tiny_model(intermediate_size=320))
    with pytest.raises(RuntimeError, match="'first' cannot be served"):
        sglang_runner(
            tiny_model(intermediate_size=333), enable_lora=True, lora_paths=[f"first={adapter.folder}"]
        )


def test_weights_of_modules_that_are_not_served_are_refused_when_loaded(
    sglang_runner, tiny_model, peft_adapter
):
    from sglang.srt.lora.lora_registry import LoRARef

    path = tiny_model()
    runner = sglang_runner(path, enable_lora=True)
    adapter = peft_adapter(path, ("q_proj", "v_proj"))
    stray = "base_model.model.model.layers.0.input_layernorm.weight"
    tensors = {**adapter.tensors, stray: next(iter(adapter.tensors.values()))}
    ref = LoRARef(lora_id="stray", lora_name="stray", lora_path="__tensor__", pinned=False)
    result = runner.load_lora_adapter_from_tensors(ref, tensors, adapter.config)
    assert not result.success and stray in result.error_message
    assert "stray" not in runner.lora_manager.loras


# ------------------------------------------------------------------ 04 what PEFT writes
@pytest.mark.parametrize(
    "modules", [*itertools.combinations(MODULES, 1), ("k_proj", "up_proj"), ("q_proj", "v_proj")]
)
def test_any_subset_of_modules_answers_as_under_peft(
    modules, sglang_runner, tiny_model, greedy_tokens, peft_adapter
):
    path = tiny_model("qwen3", head_dim=24, intermediate_size=333)
    runner = sglang_runner(path, enable_lora=True)
    adapter = peft_adapter(path, modules)
    lora_id, result = load(runner, adapter)
    assert result.success, result.error_message
    assert greedy_tokens(runner, PROMPTS, 6, [lora_id] * 2) == adapter.greedy(PROMPTS, 6)


def test_rank_stabilized_adapter_scales_as_under_peft(sglang_runner, tiny_model, greedy_tokens, peft_adapter):
    path = tiny_model()
    runner = sglang_runner(path, enable_lora=True)
    adapter = peft_adapter(path, use_rslora=True, alpha=4)
    lora_id, result = load(runner, adapter)
    assert result.success and runner.lora_manager.loras[lora_id].scaling == pytest.approx(4 / 8**0.5)
    assert greedy_tokens(runner, PROMPTS, 6, [lora_id] * 2) == adapter.greedy(PROMPTS, 6)


# ------------------------------------------------------------------ 05 adapters as other trainers write them
def variant(adapter, folder: Path, tensors=None, **changes) -> SimpleNamespace:
    """The adapter's folder with other tensors, or another config."""
    folder.mkdir()
    save_file(dict(adapter.tensors if tensors is None else tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**adapter.config, **changes}))
    return SimpleNamespace(folder=str(folder))


@pytest.fixture(scope="module")
def plain(tiny_model, peft_adapter):
    path = tiny_model()
    return path, peft_adapter(path)


def test_what_means_the_same_to_peft_answers_the_same(sglang_runner, plain, greedy_tokens, tmp_path):
    path, adapter = plain
    runner = sglang_runner(path, enable_lora=True)
    named = {name.replace(".weight", ".default.weight"): t for name, t in adapter.tensors.items()}
    same = [
        variant(adapter, tmp_path / "float", r=8.0, lora_alpha=16.0),
        variant(adapter, tmp_path / "named", named),
        variant(adapter, tmp_path / "all", target_modules="all-linear"),
        variant(adapter, tmp_path / "again", alpha_pattern={"q_proj": 16}, rank_pattern={"v_proj": 8}),
    ]
    expected = adapter.greedy(PROMPTS, 6)
    for folder in same:
        lora_id, result = load(runner, folder)
        assert result.success, result.error_message
        assert greedy_tokens(runner, PROMPTS, 6, [lora_id] * 2) == expected
        assert runner.unload_lora_adapter(runner.lora_manager.lora_refs[lora_id]).success


SAVED = ("lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"r": "8"}, (), "r is '8'"),
        ({"r": 8.5}, (), "r is 8.5"),
        ({"r": True}, (), "r is True"),
        ({"r": 0}, (), "r is 0"),
        ({"lora_alpha": None}, (), "lacks lora_alpha"),
        ({"alpha_pattern": {"q_proj": 1}}, (), "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, (), "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, SAVED[:1], "modules_to_save"),
        *(({}, (name,), f"{name} is not a LoRA weight") for name in SAVED),
        ({}, ("model.layers.9.self_attn.q_proj.lora_A.weight",), "is of layer 9, and the model has 2 layers"),
        ({}, ("model.layers.0.mlp.experts.lora_A.weight",), "mlp.experts, which the model does not have"),
        ({"target_modules": ["q_proj", "lm_head"]}, (), "--lora-target-modules"),
        ({"init_lora_weights": "pissa"}, (), "init_lora_weights"),
    ],
)
@pytest.mark.parametrize("way", ["path", "tensors"])
def test_what_peft_runs_otherwise_is_refused_by_name_and_leaves_nothing(
    changes, extra, message, way, sglang_runner, plain, tmp_path
):
    import torch
    from sglang.srt.lora.lora_registry import LoRARef

    path, adapter = plain
    runner = sglang_runner(path, enable_lora=True)
    tensors = {**adapter.tensors, **{f"base_model.model.{name}": torch.zeros(8, 64) for name in extra}}
    before = [dict(d) for d in (runner.lora_manager.configs, runner.lora_manager.loras)]
    if way == "path":
        _, result = load(runner, variant(adapter, tmp_path / "bad", tensors, **changes))
    else:
        ref = LoRARef(lora_id="bad", lora_name="bad", lora_path="__tensor__", pinned=False)
        result = runner.load_lora_adapter_from_tensors(ref, tensors, {**adapter.config, **changes})
    assert not result.success and message in result.error_message
    assert [runner.lora_manager.configs, runner.lora_manager.loras] == before


def test_an_adapter_without_weights_or_in_two_files_is_refused(sglang_runner, plain, tmp_path):
    import torch

    path, adapter = plain
    runner = sglang_runner(path, enable_lora=True)
    empty = variant(adapter, tmp_path / "empty", {"base_model.model.unused": torch.zeros(1)})
    twice = variant(adapter, tmp_path / "twice")
    save_file(dict(adapter.tensors), tmp_path / "twice" / "again.safetensors")
    gone = SimpleNamespace(folder=str(tmp_path / "gone"))
    torn = variant(adapter, tmp_path / "torn")
    (tmp_path / "torn" / "adapter_config.json").write_text("{")
    for folder, message in (
        (empty, "base_model.model.unused is not a LoRA weight"),
        (twice, "comes twice"),
        (gone, "no folder of an adapter"),
        (torn, "adapter_config.json in"),
    ):
        _, result = load(runner, folder)
        assert not result.success and message in result.error_message


def test_a_rank_above_the_servers_is_refused_with_the_flag(sglang_runner, tiny_model, peft_adapter):
    path = tiny_model()
    runner = sglang_runner(path, enable_lora=True)
    _, result = load(runner, peft_adapter(path, rank=32))
    assert not result.success
    assert (
        "r is 32, and this server takes at most 16: start it with --max-lora-rank 32" in result.error_message
    )


def test_an_adapter_that_is_not_loaded_is_unloaded_already(sglang_runner, tiny_model):
    from sglang.srt.lora.lora_registry import LoRARef

    runner = sglang_runner(tiny_model(), enable_lora=True)
    assert runner.unload_lora_adapter(LoRARef(lora_id="never", lora_name="never")).success


def test_tensors_that_cannot_be_read_are_an_error_of_the_request(sglang_runner, tiny_model):
    from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput
    from sglang.srt.managers.tp_worker import BaseTpWorker

    runner = sglang_runner(tiny_model(), enable_lora=True)
    worker = SimpleNamespace(model_runner=runner, tp_rank=0)
    worker.deserialize_own_rank = lambda payloads: BaseTpWorker.deserialize_own_rank(worker, payloads)
    for junk in ("", "AAAA", "no base64 at all: \u00e9"):
        tensors: dict[str, Any] = {"serialized_tensors": junk}
        if NEWEST:
            tensors = {"serialized_named_tensors": [junk.encode()]}
        request = LoadLoRAAdapterFromTensorsReqInput(lora_name="x", lora_id="x", config_dict={}, **tensors)
        result = BaseTpWorker.load_lora_adapter_from_tensors(worker, request)
        assert not result.success and "'x' cannot be" in result.error_message

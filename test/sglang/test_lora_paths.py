"""Adapters given at start: a bad one is one sentence before anything is loaded."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.http.start_up.lora_paths import check_lora_paths
from support.model_runner import NEWEST


@pytest.fixture(scope="module")
def adapter(tiny_model, peft_adapter) -> tuple[str, Any]:
    path = tiny_model()
    return path, peft_adapter(path)


@pytest.fixture
def check(adapter) -> Callable[..., None]:
    """``check(lora_paths, **server_args)`` against the model that the adapter was made on."""
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(adapter[0])

    def run(lora_paths: Any, **values: Any) -> None:
        given = {"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": None, **values}
        if NEWEST:  # as given: the check comes before SGLang has looked for the adapters
            check_lora_paths(ServerArgs(model_path=adapter[0], device="cpu", lora_paths=lora_paths, **given))
            return
        model = SimpleNamespace(hf_config=config)
        check_lora_paths(SimpleNamespace(lora_paths=lora_paths, get_model_config=lambda: model, **given))

    return run


def write(folder: Path, adapter: Any, tensors: Any = None, **changes: Any) -> str:
    folder.mkdir()
    save_file(dict(adapter.tensors if tensors is None else tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**adapter.config, **changes}))
    return str(folder)


def test_adapters_of_the_model_pass_in_every_form(check, adapter):
    from sglang.srt.lora.lora_registry import LoRARef

    folder = adapter[1].folder
    for entry in (folder, f"a={folder}", {"lora_name": "a", "lora_path": folder, "pinned": True}):
        check([entry])
    check({"a": folder, "b": folder})
    check([LoRARef(lora_name="a", lora_path=folder)])
    check(None)
    check(["a=/nowhere"], enable_lora=False)  # SGLang ignores them then
    check([folder], max_lora_rank=None, lora_target_modules=["all"])


def test_an_adapter_whose_weights_are_pickled_is_read_as_well(check, adapter, tmp_path):
    import torch

    folder = Path(write(tmp_path / "bin", adapter[1]))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(adapter[1].tensors, folder / "adapter_model.bin")
    check([str(folder)])
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="x is not a LoRA weight"):
        check([str(folder)])
    for content in (b"", b"not one", pickle.dumps(print, protocol=2)):
        (folder / "adapter_model.bin").write_bytes(content)
        with pytest.raises(UnsupportedError, match=r"adapter_model\.bin cannot be read"):
            check([str(folder)])


def test_a_bad_entry_is_one_sentence_that_names_it(check, adapter, tmp_path):
    _path, good = adapter
    weight = next(iter(good.tensors))
    cases = {
        "rank": ({"r": 32}, None, {}, "r is 32, and this server takes at most 16"),
        "float": ({"r": 8.5}, None, {}, "r is 8.5"),
        "saved": ({"modules_to_save": ["lm_head"]}, None, {}, "modules_to_save"),
        "module": ({}, None, {"lora_target_modules": ["q_proj"]}, "--lora-target-modules"),
        "layer": (
            {},
            {**good.tensors, weight.replace("layers.0", "layers.7"): good.tensors[weight].clone()},
            {},
            "layer 7",
        ),
        "half": ({}, {k: v for k, v in good.tensors.items() if k != weight}, {}, "no lora_A for"),
        "empty": ({}, {"unused": good.tensors[weight]}, {}, "unused is not a LoRA weight"),
    }
    for name, (changes, tensors, flags, message) in cases.items():
        folder = write(tmp_path / name, good, tensors, **changes)
        with pytest.raises(UnsupportedError, match=f"--lora-paths {name}={folder}: .*{message}") as caught:
            check([f"{name}={folder}"], **flags)
        assert "\n" not in str(caught.value)


def test_what_is_no_adapter_is_said(check, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    torn = Path(write(tmp_path / "torn", adapter[1]))
    (torn / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    words = Path(write(tmp_path / "words", adapter[1]))
    (words / "adapter_config.json").write_text("{")
    bare = Path(write(tmp_path / "bare", adapter[1]))
    (bare / "adapter_model.safetensors").unlink()
    for name, message in (
        ("empty", "adapter_config.json"),
        ("file", "it is a file"),
        ("gone", "there is no such folder"),
        ("torn", "is not a safetensors file"),
        ("words", "is not JSON"),
        ("bare", "there is no adapter_model.safetensors"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            check([f"a={tmp_path / name}"])
    with pytest.raises(UnsupportedError, match="the name 'a' is given twice"):
        check([f"a={adapter[1].folder}"] * 2)


def test_the_launcher_ends_with_that_sentence(adapter, tmp_path):
    path, good = adapter
    folder = write(tmp_path / "bad", good, use_dora=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sglang_harli.launch_server",
            "--device",
            "cpu",
            "--model-path",
            path,
            "--lora-paths",
            f"bad={folder}",
            "--harli-run-dir",
            str(tmp_path / "runs"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last
        == f"sglang-harli: --lora-paths bad={folder}: use_dora (DoRA) is not served; accepted: plain LoRA weights"
    )

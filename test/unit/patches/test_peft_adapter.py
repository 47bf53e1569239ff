"""What is said of an adapter that PEFT would run otherwise than SGLang: the field or the weight, by
name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.errors import UnsupportedError
from sglang_harli.patches.lora.peft_adapter import (
    PREFIX,
    Model,
    check_limits,
    check_weights,
    checked_config,
    model_of,
    plain_name,
    safetensors_weights,
)

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
LLAMA = SimpleNamespace(
    architectures=["LlamaForCausalLM"],
    num_hidden_layers=2,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=96,
    original_intermediate_size=77,
    vocab_size=50,
)
MODEL = model_of(LLAMA)
SIZES = {"self_attn.q_proj": (24, 32), "self_attn.v_proj": (24, 16), "mlp.down_proj": (77, 24)}


def weights(rank: int = 4, layers: int = 2) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for path, (inputs, outputs) in SIZES.items():
            name = f"{PREFIX}model.layers.{layer}.{path}"
            found |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    return found


def check(config: dict[str, Any], found: dict[str, tuple[int, ...]], model: Model = MODEL) -> None:
    check_weights(checked_config(config), found.items(), model)


def test_an_adapter_of_the_model_passes_with_its_own_sizes_not_the_padded_ones() -> None:
    check(CONFIG, weights())
    assert MODEL.linears["mlp.down_proj"] == (77, 24)


@pytest.mark.parametrize("rank", [4, 4.0])
def test_a_rank_becomes_a_whole_number(rank: float) -> None:
    checked = checked_config({**CONFIG, "r": rank})
    assert checked["r"] == 4 and type(checked["r"]) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4.5}, "r is 4.5; accepted: whole numbers from 1"),
        ({"r": 0}, "r is 0"),
        ({"r": -4}, "r is -4"),
        ({"r": True}, "r is True; accepted: numbers"),
        ({"r": "4"}, "r is '4'"),
        ({"r": [4]}, r"r is \[4\]"),
        ({"r": None}, "lacks r"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": False}, "lora_alpha is False"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not served"),
        ({"peft_type": None}, "lacks peft_type"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"target_modules": []}, "target_modules is"),
        ({"target_modules": [7]}, "target_modules is"),
        ({"target_modules": r".*\.q_proj"}, "is the pattern"),
        ({"exclude_modules": r".*\.q_proj"}, "exclude_modules is"),
        ({"exclude_modules": [5]}, "exclude_modules is"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform is"),
        ({"layers_pattern": "(a+)+"}, "layers_pattern has"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is not served"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not served"),
        ({"rank_pattern": [2]}, "rank_pattern is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA'"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused_by_its_field(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        checked_config({**CONFIG, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": -1.5},
        {"lora_alpha": 0},
        {"alpha_pattern": {"q_proj": 8}, "rank_pattern": {"q_proj": 4}},  # the common ones, said again
        {"target_modules": "all-linear"},
        {"bias": "all", "lora_bias": True},  # without a bias in the file there is none
        {"fan_in_fan_out": True},  # PEFT itself takes it back for a linear layer
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"exclude_modules": ["lm_head"]},
        {"layers_to_transform": [0, 1]},
        {"peft_type": "lora", "a_field_of_tomorrow": None},
    ],
)
def test_what_peft_computes_as_plain_lora_passes(change: dict[str, Any]) -> None:
    check({**CONFIG, **change}, weights())


@pytest.mark.parametrize("config", [[], "x", None])
def test_a_config_that_is_no_object_is_refused(config: Any) -> None:
    with pytest.raises(UnsupportedError, match="not an object"):
        checked_config(config)


# ------------------------------------------------------------------ weights
LAYER = f"{PREFIX}model.layers.0."


def renamed(old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {name.replace(old, new): shape for name, shape in weights().items()}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "no LoRA weights"),
        ({f"{PREFIX}unused": (1,)}, "base_model.model.unused is not a LoRA weight"),
        (
            {**weights(), f"{PREFIX}lm_head.weight": (50, 24)},
            "lm_head.weight is not a LoRA weight.*modules_to_save",
        ),
        ({**weights(), f"{PREFIX}model.norm.weight": (24,)}, "model.norm.weight is not a LoRA weight"),
        ({**weights(), f"{LAYER}input_layernorm.weight": (24,)}, "input_layernorm.weight is not"),
        ({**weights(), f"{LAYER}self_attn.q_proj.lora_magnitude_vector": (32,)}, "DoRA"),
        ({**weights(), f"{LAYER}self_attn.q_proj.lora_B.bias": (32,)}, "lora_B.bias is not.*biases"),
        ({**weights(), f"{LAYER}self_attn.q_proj.bias": (32,)}, "q_proj.bias is not.*biases"),
        ({**weights(layers=3)}, r"layers\.2\..* is of layer 2, and the model has 2 layers \(0 to 1\)"),
        (renamed("layers.1", "layers.99"), "is of layer 99"),
        (renamed("self_attn.q_proj", "attention.wq"), "attention.wq, which the model does not have"),
        (renamed("model.layers", "model.language_model.layers"), "language_model"),
        (renamed(PREFIX, ""), "does not begin with base_model.model."),
        (renamed(PREFIX, "base_model."), "is of layers.0.self_attn.q_proj, which the model does not have"),
        (renamed("lora_A.weight", "lora_A.other.weight"), "is not a LoRA weight as PEFT names them"),
        ({**weights(), f"{LAYER}self_attn.q_proj.lora_A.default.weight": (4, 24)}, "comes twice"),
        ({**weights(), f"{LAYER}self_attn.k_proj.lora_A.weight": (4, 24)}, "not of the target modules"),
        ({k: v for k, v in weights().items() if "lora_A" in k}, "no lora_B for"),
        ({k: v for k, v in weights().items() if "q_proj.lora_A" not in k}, "no lora_A for .*q_proj"),
        (
            {**weights(), f"{LAYER}self_attn.q_proj.lora_A.weight": (4, 25)},
            r"shape \(4, 25\).*needs \(4, 24\)",
        ),
        ({**weights(), f"{LAYER}self_attn.q_proj.lora_A.weight": (4,)}, r"shape \(4,\)"),
        ({**weights(), f"{LAYER}self_attn.q_proj.lora_B.weight": (2, 32, 4)}, r"shape \(2, 32, 4\)"),
        ({**weights(), f"{LAYER}mlp.down_proj.lora_A.weight": (4, 96)}, r"shape \(4, 96\).*needs \(4, 77\)"),
        (weights(rank=8), "at rank 4 needs"),
    ],
)
def test_weights_that_peft_or_sglang_would_leave_out_are_refused_by_name(
    found: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check(CONFIG, found)


@pytest.mark.parametrize(
    "change",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    ],
)
def test_weights_that_the_config_leaves_out_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="PEFT would leave it out"):
        check({**CONFIG, **change}, weights())


def test_a_layer_that_the_config_names_may_come_alone() -> None:
    config = {**CONFIG, "layers_to_transform": [1]}
    check(config, {name: shape for name, shape in weights().items() if "layers.1." in name})


def test_the_adapters_own_name_in_a_key_is_peft_s_as_well() -> None:
    named = renamed(".weight", ".default.weight")
    check(CONFIG, named)
    assert {plain_name(name) for name in named} == set(weights())


def test_a_lora_of_the_embedding_may_come_with_the_frozen_embedding() -> None:
    config = {**CONFIG, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"]}
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, 50),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": (24, 4),
        f"{PREFIX}model.embed_tokens.base_layer.weight": (50, 24),
    }
    check(config, weights() | embedding)
    with pytest.raises(UnsupportedError, match=r"base_layer\.weight is not a LoRA weight"):
        check(config, weights() | embedding | {f"{PREFIX}model.embed_tokens.base_layer.weight": (51, 24)})
    with pytest.raises(UnsupportedError, match="not of the target modules"):
        check(CONFIG, weights() | embedding)


def test_of_an_unknown_architecture_only_marks_and_layers_are_checked() -> None:
    model = model_of(SimpleNamespace(architectures=["SomethingElse"], num_hidden_layers=2))
    check(CONFIG, renamed("model.layers", "language_model.model.layers"), model)
    for name in ("base_model.model.layers.5.x.lora_A.weight", "base_model.model.layers.0.norm.weight"):
        with pytest.raises(UnsupportedError, match=name):
            check(CONFIG, {name: (4, 4)}, model)


# ------------------------------------------------------------------ limits
def test_a_rank_above_the_servers_names_both_and_the_flag() -> None:
    with pytest.raises(
        UnsupportedError, match=r"r is 4, and this server takes at most 2: .*--max-lora-rank 4"
    ):
        check_limits(checked_config(CONFIG), 2, None)
    check_limits(checked_config(CONFIG), 4, None)
    check_limits(checked_config(CONFIG), None, None)


def test_a_module_that_is_not_served_names_those_that_are_and_the_flag() -> None:
    config = checked_config({**CONFIG, "target_modules": ["q_proj", "model.lm_head"]})
    with pytest.raises(
        UnsupportedError, match=r"has model\.lm_head.* k_proj, o_proj, q_proj, v_proj.*--lora-target"
    ):
        check_limits(config, 8, ["qkv_proj", "o_proj"])
    check_limits(config, 8, ["q_proj", "lm_head"])  # as the flag names them
    check_limits(config, 8, ["all"])


# ------------------------------------------------------------------ files
def test_the_header_of_a_safetensors_file_gives_names_and_shapes(tmp_path: Path) -> None:
    def write(header: str) -> Path:
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 16)
        return path

    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert safetensors_weights(write(json.dumps({"__metadata__": {"format": "pt"}, "a": entry}))) == [
        ("a", (2, 2))
    ]
    twice = f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}'
    assert [name for name, _ in safetensors_weights(write(twice))] == ["a", "a"]
    for junk in ("", "{", "[1]", '{"a": 5}'):
        with pytest.raises(UnsupportedError, match="is not a safetensors file"):
            safetensors_weights(write(junk))

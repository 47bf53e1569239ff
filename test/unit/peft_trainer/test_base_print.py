"""What makes two served models the same base, and what makes them two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sglang_harli.peft_trainer.base import base_print, frozen_base
from sglang_harli.protocol.base_print import BasePrint, difference

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def model(kind: str = "llama", layers: int = 5, seed: int = 0, **values: Any) -> Any:
    torch.manual_seed(seed)
    config, made = KINDS[kind]
    return made(config(**SIZES, num_hidden_layers=layers, **values)).float()


def taken(made: Any, dtype: torch.dtype = torch.float32, name: str = "m", path: str = "m") -> BasePrint:
    served = copy.deepcopy(made).to(dtype)
    return base_print.take(frozen_base.from_transformers(served), name, path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_one_base_in_every_dtype_that_it_is_served_in(kind: str) -> None:
    made = model(kind)
    for parameter in made.parameters():  # sizes from subnormal in float16 up
        parameter.data *= torch.exp(8 * torch.randn_like(parameter)).clamp(1e-9, 1e3)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    exact = [taken(made, dtype) for dtype in dtypes]
    rounded = [taken(copy.deepcopy(made).to(torch.bfloat16), dtype) for dtype in dtypes]
    for found in (exact, rounded):
        assert [difference(one, other) for one in found for other in found] == [""] * 9
    # The checkpoint that was saved in bfloat16 is the other one, as far as bfloat16 can tell.
    assert exact[1] == rounded[1] and difference(exact[1], rounded[0]) == ""
    assert difference(exact[0], rounded[0]) == "their weights differ"


def test_how_it_is_named_and_placed_makes_no_other_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    made = model()
    local, hub = taken(made, name="one", path="org"), taken(made, name="two", path="org/model")
    assert local.path == str(tmp_path / "org") and hub.path == "org/model"
    assert difference(local, hub) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "part", ["embed_tokens", "self_attn.v_proj", "mlp.down_proj", "lm_head", "model.norm"]
)
def test_a_part_with_other_weights_is_another_base(part: str, dtype: torch.dtype) -> None:
    made = model()
    other = copy.deepcopy(made)
    for name, parameter in other.named_parameters():
        if part in name:
            parameter.data *= 1.02
    assert difference(taken(made, dtype), taken(other, dtype)) == "their weights differ"
    across = difference(taken(made), taken(other, torch.float16))
    assert across.startswith("their weights differ, those of ") and part in across


@pytest.mark.parametrize("layer", range(5))
def test_one_layer_with_slightly_other_weights_is_another_base(layer: int) -> None:
    made = model()
    other = copy.deepcopy(made)
    other.model.layers[layer].self_attn.q_proj.weight.data += 1e-4
    assert difference(taken(made), taken(other)) == "their weights differ"


def test_another_config_is_another_base_and_its_fields_are_named() -> None:
    one, other = taken(model()), taken(model(rms_norm_eps=1e-5, rope_theta=5e5))
    text = difference(one, other)
    assert text.startswith("their configs differ: ") and "rms_norm_eps 1e-06 and 1e-05" in text


def test_tied_weights_are_sampled_once_and_other_parameters_are_named() -> None:
    tied, bias = taken(model("qwen2", tie_word_embeddings=True)), taken(model("qwen3"))
    assert "lm_head.weight" not in tied.weights
    unlike = msgspec.structs.replace(bias, math=tied.math)
    assert difference(tied, unlike).startswith("their parameters differ: one of them has no lm_head.weight")


def test_it_is_small_and_the_same_after_it_was_stored() -> None:
    one = taken(model(layers=80), torch.bfloat16)
    stored = msgspec.json.encode(one)
    assert len(stored) < 4096
    assert difference(one, msgspec.json.decode(stored, type=BasePrint)) == ""
    assert difference(one, msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=BasePrint)) == ""


def test_values_that_are_no_numbers_can_be_stored() -> None:
    made = model()
    for parameter in made.parameters():
        parameter.data.fill_(float("nan"))
    one = taken(made)
    assert difference(one, msgspec.json.decode(msgspec.json.encode(one), type=BasePrint)) == ""

"""The table of architectures agrees with transformers' own modules and, in SGLang's names, with the
served model's."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from sglang_harli import architectures
from sglang_harli.architectures import ALL_LINEAR, FUSED, INPUT_GROUPS, LINEARS, ROWS, Architecture

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_a_row_says_what_transformers_builds(row: Architecture) -> None:
    config = getattr(transformers, row.config)(**SMALL)
    assert config.model_type == row.model_type
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == row.name
    layer = model.model.layers[0]
    found = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert list(found) == [f"{place}.{name}" for name, place in LINEARS.items()]
    biased = {name.rsplit(".", 1)[-1] for name, linear in found.items() if linear.bias is not None}
    assert biased == (set(INPUT_GROUPS[0]) if row.qkv_bias else set())
    assert (getattr(layer.self_attn, "q_norm", None) is not None) == row.head_norms
    wider = getattr(transformers, row.config)(**SMALL, **({"head_dim": 16} if row.own_head_dim else {}))
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(wider).model.layers[0].self_attn
    assert attention.q_proj.out_features == (64 if row.own_head_dim else 32)


def test_the_groups_have_each_linear_once() -> None:
    assert tuple(name for group in INPUT_GROUPS for name in group) == ALL_LINEAR
    assert all(len({FUSED.get(name) for name in group}) == 1 for group in INPUT_GROUPS)
    assert len(architectures.BY_NAME) == len(architectures.BY_TYPE) == len(ROWS)

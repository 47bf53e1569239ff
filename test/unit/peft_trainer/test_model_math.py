"""The table of config fields: complete over the sources of SGLang and transformers, and what is
done about each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from sglang_harli.errors import UnsupportedError
from sglang_harli.peft_trainer.base import model_math
from sglang_harli.sglang_versions import supported

NEWEST = supported.folder() == "newest"
# Fields that the newest SGLang, or its transformers, reads and the other does not.
NEWEST_ALONE = {"per_layer_config", "vision_config", "enable_lm_head_fp32", "enable_lm_head_output_fp32"}
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def source(package: str, path: str) -> ast.Module:
    """A file of an installed package, which is not imported (``find_spec`` may hide it:
    service/tokenizer/hidden_torch.py)."""
    spec = PathFinder.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return ast.parse((Path(spec.submodule_search_locations[0]) / path).read_text())


def function(tree: ast.Module, name: str) -> ast.AST:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def fields_read(tree: ast.AST) -> set[str]:
    """X of each ``config.X``, ``getattr(config, "X")`` and ``hasattr(config, "X")``."""

    def is_config(node: ast.AST) -> bool:
        return ast.unparse(node).rsplit(".", 1)[-1] == "config"

    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            target, name = node.args[:2]
            if is_config(target) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found - {"__class__", "standardize_rope_params", "validate_rope"}


def keys_read(tree: ast.AST, names: tuple[str, ...]) -> Iterator[Any]:
    """Keys that are looked up in a dict of one of these names, or compared with its keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(names):
            if isinstance(node.slice, ast.Constant):
                yield node.slice.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "get" and ast.unparse(node.func.value).endswith(names):
                yield ast.literal_eval(node.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_get_rope_param":
            yield ast.literal_eval(node.args[1])
        elif isinstance(node, ast.DictComp) and ast.unparse(node.generators[0].iter).startswith(
            "rope_scaling"
        ):
            for test in node.generators[0].ifs:
                yield from (part.value for part in ast.walk(test) if isinstance(part, ast.Constant))


def test_every_field_that_sglang_or_transformers_reads_is_known() -> None:
    read: set[str] = set()
    for path in ("models/llama.py", "models/mistral.py", "models/qwen2.py", "models/qwen3.py"):
        read |= fields_read(source("sglang", f"srt/{path}"))
    read |= fields_read(source("sglang", "srt/layers/logits_processor.py"))
    read |= fields_read(function(source("sglang", "srt/utils/hf_transformers/common.py"), "get_rope_config"))
    for arch in ARCHITECTURES:
        read |= fields_read(source("transformers", f"models/{arch}/modeling_{arch}.py"))
    read |= fields_read(source("transformers", "modeling_rope_utils.py"))
    known = {*model_math.COMPUTED, *model_math.REFUSED, *model_math.HARMLESS}
    assert len(known) == len(model_math.COMPUTED) + len(model_math.REFUSED) + len(model_math.HARMLESS)
    assert read - known == set()
    # The other way round, what these files do not read is read where SGLang chooses an attention or
    # a weight.
    elsewhere = {"attention_chunk_size", "is_hybrid_swa", "quantization_config"}
    assert known - read - elsewhere == (set() if NEWEST else NEWEST_ALONE)


def test_every_rotary_parameter_that_is_read_is_known() -> None:
    factory = function(source("sglang", "srt/layers/rotary_embedding/factory.py"), "get_rope")
    utilities = source("transformers", "modeling_rope_utils.py")
    read = {*keys_read(factory, ("rope_scaling",)), *keys_read(utilities, ("rope_parameters_dict",))}
    known = {*model_math.ROPE_COMPUTED, *model_math.ROPE_REFUSED, *model_math.ROPE_HARMLESS}
    assert read - known == set()
    assert known - read <= {"partial_rotary_factor"} | (set() if NEWEST else {"video_rope"})


def config(arch: str = "llama", **changes: Any) -> Any:
    return AutoConfig.for_model(arch, architectures=[f"{ARCHITECTURES[arch]}ForCausalLM"], **changes)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_plain_config_passes_and_its_fields_are_plain_values(arch: str) -> None:
    plain = config(arch, head_dim=16, hidden_size=64, num_attention_heads=4)
    model_math.check(plain)
    fields = model_math.math_fields(plain)
    assert fields["architecture"] == f"{ARCHITECTURES[arch]}ForCausalLM"
    assert fields["head_dim"] == 16 and fields["hidden_size"] == 64
    assert fields["rope"]["rope_type"] == "default"
    assert not {"pad_token_id", "sliding_window", "attention_dropout", "initializer_range"} & fields.keys()


@pytest.mark.parametrize(
    ("arch", "changes", "named"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("mistral", {"rope_is_neox_style": False}, "rope_is_neox_style False"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config"),
        ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size 8192"),
        ("qwen3", {"is_hybrid_swa": True}, "is_hybrid_swa True"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "video_rope": True}}, "video_rope True"),
        *(
            [("qwen3", {"per_layer_config": {0: {"intermediate_size": 8}}}, "per_layer_config {")]
            if NEWEST
            else []
        ),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "use_fope": True}},
            "use_fope",
        ),
        ("qwen2", {"rope_scaling": {"type": "deepseek_yarn"}}, "rope_type 'deepseek_yarn'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(arch: str, changes: dict[str, Any], named: str) -> None:
    served = config(arch)
    for name, value in changes.items():
        setattr(served, name, value)
    with pytest.raises(UnsupportedError, match=rf"{named}.*--harli-finetune off") as raised:
        model_math.check(served)
    assert raised.value.param == "--model-path"


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {"partial_rotary_factor": 0.5}),  # SGLang's Qwen2 and Qwen3 do not read it
        ("qwen3", {"rope_is_neox_style": False}),
        ("llama", {"partial_rotary_factor": 1.0}),
        ("llama", {"final_logit_softcapping": -1.0, "quantization_config": None}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"attention_dropout": 0.1}),
    ],
)
def test_what_sglang_does_not_read_or_does_not_use_passes(arch: str, changes: dict[str, Any]) -> None:
    served = config(arch)
    before = model_math.math_fields(served)
    for name, value in changes.items():
        setattr(served, name, value)
    model_math.check(served)
    assert model_math.math_fields(served) == before


def test_what_sglang_pads_on_a_cpu_is_undone() -> None:
    plain = config(
        "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=333
    )
    before = model_math.math_fields(plain)
    plain.intermediate_size, plain.original_intermediate_size = 352, 333
    plain.num_attention_heads, plain.original_num_attention_heads = 6, 4
    plain.num_key_value_heads, plain.original_total_num_kv_heads = 3, 2
    plain.head_dim = plain.v_head_dim = 16
    assert model_math.math_fields(plain) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_norm_eps", 1e-3), ("tie_word_embeddings", True), ("attention_bias", True), ("bias", True)],
)
def test_a_field_that_changes_the_result_changes_the_fields(name: str, value: Any) -> None:
    served = config("llama")
    before = model_math.math_fields(served)
    setattr(served, name, value)
    assert model_math.math_fields(served) != before


def test_rotary_parameters_count_by_what_sglang_makes_of_them() -> None:
    def fields(**values: Any) -> dict[str, Any]:
        served = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
        return model_math.math_fields(SimpleNamespace(**{**served, "max_position_embeddings": 512, **values}))

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
    plain = fields(rope_parameters=yarn)
    assert plain["rope"] == yarn and "max_position_embeddings" not in plain
    assert fields(rope_parameters={**yarn, "attention_factor": 1.0, "type": "yarn"}) == plain
    assert fields(rope_parameters={**yarn, "attn_factor": 0.5}) != plain
    assert fields(rope_scaling=yarn) == plain
    # Without the original length YaRN and dynamic scaling take that of the config.
    short = {name: value for name, value in yarn.items() if name != "original_max_position_embeddings"}
    assert fields(rope_parameters=short)["max_position_embeddings"] == 512
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert fields(**old)["rope"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}

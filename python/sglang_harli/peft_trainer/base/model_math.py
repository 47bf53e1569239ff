"""Which fields of a model's config change what the model computes, and what is done about each.

Every config field that SGLang's or transformers' Llama, Mistral, Qwen2 and Qwen3 read is in one of
three tables:

    COMPUTED    changes the result; training computes it as SGLang does
    REFUSED     changes the result in SGLang, and training does not compute that: another value than a neutral one
                is refused by name
    HARMLESS    read by one of the two, without effect on what SGLang computes for these architectures

A test takes the fields from the sources of both, so that an upgrade that reads another one fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_harli.architectures import BY_NAME
from sglang_harli.errors import UnsupportedError

# Rotary embeddings that are one table in SGLang; dynamic is: SGLang scales it once, at load.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
WAY_OUT = "; start with --harli-finetune off to serve this model without finetuning"

COMPUTED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "bias",  # SGLang's Llama: another name of attention_bias
    "rope_parameters",
    "rope_scaling",  # transformers 5: another name of rope_parameters
    "rope_theta",  # where rope_parameters has none
    "original_max_position_embeddings",  # goes into rope_parameters
    "max_position_embeddings",
)
_ALL = tuple(BY_NAME)
_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")  # one file in SGLang
# Field: (neutral values, architectures whose code reads it, what it asks for).
REFUSED: dict[str, tuple[tuple[Any, ...], tuple[str, ...], str]] = {
    "per_layer_config": ((None,), _ALL, "layers that differ; SGLang computes them all alike"),
    "partial_rotary_factor": ((None, 1), _LLAMA, "rotates a part of each head"),
    "rope_is_neox_style": ((None, True), _LLAMA, "rotates neighbouring values"),
    "mlp_bias": ((None, False), ("LlamaForCausalLM",), "SGLang leaves these biases out"),
    "dual_chunk_attention_config": ((None,), _ALL, "attends in chunks"),
    "attention_chunk_size": ((None,), _ALL, "attends in chunks"),
    "is_hybrid_swa": ((None, False), _ALL, "attends in sliding windows"),
    "final_logit_softcapping": ((None, 0), _ALL, "caps the logits"),
    "quantization_config": ((None, {}), _ALL, "quantised weights"),
}
HARMLESS: dict[str, str] = {
    "pad_token_id": "whose embedding transformers keeps from being trained; it is frozen here",
    "attention_dropout": "for training in transformers; a model is served, and trained here, without it",
    "sliding_window": "SGLang serves these architectures with full attention",
    "layer_types": "which layers have a sliding window",
    "scale_emb": "for embeddings that come with a request",
    "target_hidden_size": "of a draft model",
    "original_num_attention_heads": "the number of heads before SGLang padded it",
    "_attn_implementation": "which kernel transformers takes",
    "vision_config": "of the image models in SGLang's file of Mistral",
    **dict.fromkeys(
        ("enable_lm_head_fp32", "enable_lm_head_output_fp32"),
        "how exactly serving computes the logits, as --enable-fp32-lm-head",
    ),
}
# What SGLang pads on a CPU, and where it keeps the number before.
_BEFORE_PADDING = {
    "intermediate_size": "original_intermediate_size",
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
}

# Of rope_parameters: what SGLang's tables are computed from; the last ones are YaRN's.
ROPE_COMPUTED = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "alpha",
    "extrapolation_factor",
    "attn_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
ROPE_REFUSED: dict[str, tuple[Any, ...]] = {"use_fope": (None, False), "video_rope": (None, False)}
ROPE_HARMLESS: dict[str, str] = {
    "attention_factor": "transformers' YaRN alone; SGLang reads attn_factor",
    "partial_rotary_factor": "here SGLang does not read it",
    "mrope_section": "text has one position, which all sections share",
    "mrope_interleaved": "as mrope_section",
    "mrope_interleaved_glm": "as mrope_section",
    **dict.fromkeys(("num_kv_heads", "fope_init_factor", "fope_sep_head", "num_inv_freq"), "with use_fope"),
    **dict.fromkeys(("short_factor", "long_factor", "short_mscale", "long_mscale"), "with longrope"),
}


def refuse(what: str) -> UnsupportedError:
    """The error of a model that cannot be finetuned, with the way out."""
    return UnsupportedError(f"cannot finetune on this model: {what}{WAY_OUT}", param="--model-path")


def architecture(config: Any) -> str:
    """The first of a config's architectures; from the name of its class where it names none."""
    names = getattr(config, "architectures", None)
    return names[0] if names else type(config).__name__.replace("Config", "ForCausalLM")


def check(config: Any) -> None:
    """Refuse a config (read by attribute) that SGLang computes otherwise than training does.

    Raises:
        UnsupportedError: naming the field, its value and what is accepted.
    """
    name = architecture(config)
    if name not in BY_NAME:
        raise refuse(f"architecture {name} is not supported (supported: {', '.join(BY_NAME)})")
    for field, (neutral, readers, what) in REFUSED.items():
        value = _given(config, field)
        if field == "final_logit_softcapping" and isinstance(value, int | float) and value < 0:
            value = None  # as SGLang reads it
        if name in readers and value not in neutral:
            raise refuse(f"its config has {field} {_shown(value)} ({what}), which is not supported")
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise refuse(f"rope_type {_shown(kind)} is not supported (supported: {', '.join(ROPE_TYPES)})")
    for field, neutral in ROPE_REFUSED.items():
        if rope.get(field) not in neutral:
            raise refuse(f"its rope_parameters have {field} {_shown(rope[field])}, which is not supported")


def _given(config: Any, field: str) -> Any:
    if field != "per_layer_config":
        return getattr(config, field, None)
    # In transformers 5.19 every config has a view of its layers; this one was given some.
    return config.to_dict().get(field) if getattr(config, "is_heterogeneous", False) else None


def math_fields(config: Any) -> dict[str, Any]:
    """The fields that decide what the model computes from its weights, as plain values.

    Configs that compute the same have equal fields: what SGLang added or padded on a CPU is undone,
    other names of a field are one, and fields without effect are left out.
    """
    heads = unpadded(config, "num_attention_heads")
    fields: dict[str, Any] = {"architecture": architecture(config)}
    for name in COMPUTED:
        if name != "bias" and not name.startswith(("rope_", "original_")):
            fields[name] = _plain(unpadded(config, name))
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // heads
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
    bias = bool(fields["attention_bias"])
    fields["attention_bias"] = bias or (
        fields["architecture"] in _LLAMA and bool(getattr(config, "bias", None))
    )
    rope = _rope(config)
    fields["rope"] = {key: rope[key] for key in ROPE_COMPUTED if key in rope and key != "type"}
    if not _by_length(rope):  # then it only says how long the table is
        del fields["max_position_embeddings"]
    return {name: value for name, value in fields.items() if value is not None}


def unpadded(config: Any, name: str) -> Any:
    """A field before SGLang padded it."""
    before = getattr(config, _BEFORE_PADDING.get(name, name), None)
    return getattr(config, name, None) if before is None else before


def _rope(config: Any) -> dict[str, Any]:
    """Its rotary parameters, ``rope_theta`` and ``rope_type`` among them, as plain values."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = _plain(rope)
    rope.setdefault("rope_type", rope.get("type", "default"))
    for name in ("rope_theta", "original_max_position_embeddings"):
        value = getattr(config, name, None)
        if value is not None and not (name == "rope_theta" and name in rope):
            rope[name] = _plain(value)
    return rope


def _by_length(rope: dict[str, Any]) -> bool:
    """Whether the longest position changes the table, not only how far it goes."""
    kind = rope["rope_type"]
    return kind == "dynamic" or (
        kind in ("yarn", "llama3") and rope.get("original_max_position_embeddings") is None
    )


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

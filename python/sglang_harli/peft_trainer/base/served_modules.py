"""Compares what SGLang's modules compute with, beside their weights, with what training does.

The config says what is wanted, the modules what is done: an epsilon, a scale, a window or a cap
that differs is refused by name with both values. Read by attribute (SGLang's RadixAttention,
RMSNorm, SiluAndMul, LogitsProcessor and rotary embeddings); nothing is imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sglang_harli.peft_trainer.base.model_math import refuse

# SGLang's rotary embeddings that rotate whole heads by one table; text takes the same rows of M's.
_TABLES = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "MRotaryEmbedding",
    "YaRNScalingMRotaryEmbedding",
)
_PLAIN_NORM = {"variance_size_override": None, "fp32_residual": False, "cast_x_before_out_mul": False}
_PLAIN_ATTENTION = {
    "logit_cap": 0,
    "sliding_window_size": -1,
    "use_irope": False,
    "is_cross_attention": False,
}


def check(served: Any, model: Any) -> nn.Module:
    """Compare SGLang's model with transformers' by modules; gives the shared rotary embedding.

    Raises:
        UnsupportedError: naming the module and both values.
    """
    layers, ours = served.model.layers, model.model.layers
    _same("the number of layers", len(layers), len(ours))
    rotary = layers[0].self_attn.rotary_emb
    for index, (layer, own) in enumerate(zip(layers, ours, strict=True)):
        name = f"model.layers.{index}"
        _check_attention(f"{name}.self_attn", layer.self_attn, own.self_attn)
        if layer.self_attn.rotary_emb is not rotary:
            raise refuse(f"{name}.self_attn.rotary_emb is another than that of the first layer")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _check_norm(f"{name}.{norm}", getattr(layer, norm), getattr(own, norm))
        _same(f"{name}.mlp.act_fn", type(layer.mlp.act_fn).__name__, "SiluAndMul")
    _check_norm("model.norm", served.model.norm, model.model.norm)
    processor = served.logits_processor
    _same("logits_processor", type(processor).__name__, "LogitsProcessor")
    _same("logits_processor.logit_scale", processor.logit_scale, None)
    _same("logits_processor.final_logit_softcapping", processor.final_logit_softcapping or None, None)
    _check_rotary(rotary, ours[0].self_attn.head_dim)
    return rotary


def _check_attention(name: str, attention: Any, own: Any) -> None:
    served = attention.attn
    heads = own.config.num_attention_heads
    _same(f"{name}.attn.tp_q_head_num", served.tp_q_head_num, heads)
    _same(f"{name}.attn.tp_k_head_num", served.tp_k_head_num, heads // own.num_key_value_groups)
    _same(f"{name}.attn.tp_v_head_num", served.tp_v_head_num, heads // own.num_key_value_groups)
    _same(f"{name}.attn.head_dim", served.head_dim, own.head_dim)
    _same(f"{name}.attn.v_head_dim", served.v_head_dim, own.head_dim)
    _same(f"{name}.attn.scaling", served.scaling, own.scaling)
    for field, plain in _PLAIN_ATTENTION.items():
        _same(f"{name}.attn.{field}", getattr(served, field), plain)
    _same(f"{name}.attn.attn_type", getattr(served.attn_type, "value", served.attn_type), "decoder")
    for norm in ("q_norm", "k_norm"):
        _same(f"whether {name} has {norm}", hasattr(attention, norm), hasattr(own, norm))
        if hasattr(own, norm):
            _check_norm(f"{name}.{norm}", getattr(attention, norm), getattr(own, norm))


def _check_norm(name: str, served: Any, own: Any) -> None:
    _same(name, type(served).__name__, "RMSNorm")
    _same(f"{name}.variance_epsilon", served.variance_epsilon, own.variance_epsilon)
    for field, plain in _PLAIN_NORM.items():
        _same(f"{name}.{field}", getattr(served, field, plain), plain)


def _check_rotary(rotary: Any, head_dim: int) -> None:
    kind = type(rotary).__name__
    if kind not in _TABLES:
        raise refuse(
            f"its rotary embedding is a {kind}, which is not supported (supported: {', '.join(_TABLES)})"
        )
    _same("rotary_emb.is_neox_style", rotary.is_neox_style, True)
    _same("rotary_emb.rotary_dim", rotary.rotary_dim, head_dim)
    cache = rotary.cos_sin_cache
    _same("the width of rotary_emb.cos_sin_cache", cache.shape[1], head_dim)


def _same(name: str, served: Any, ours: Any) -> None:
    if served != ours:
        raise refuse(f"{name} is {served!r} in the served model, and training computes with {ours!r}")

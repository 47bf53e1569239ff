"""The trained architectures, one row each; ``peft_trainer/layers/`` has what differs in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense decoder; ``name`` as ``architectures`` in config.json has it.

    Attributes:
        model_type, config: transformers' short name and config class.
        qkv_bias: q, k and v have biases, whatever the config says; else as its ``attention_bias``.
        head_norms: queries and keys are normalised head by head.
        own_head_dim: the config may say how wide a head is; else always hidden_size / heads.
    """

    name: str
    model_type: str
    config: str
    qkv_bias: bool = False
    head_norms: bool = False
    own_head_dim: bool = True


ROWS = (
    Architecture("LlamaForCausalLM", "llama", "LlamaConfig"),
    Architecture("MistralForCausalLM", "mistral", "MistralConfig"),
    Architecture("Qwen2ForCausalLM", "qwen2", "Qwen2Config", qkv_bias=True, own_head_dim=False),
    Architecture("Qwen3ForCausalLM", "qwen3", "Qwen3Config", head_norms=True),
)
BY_NAME = {row.name: row for row in ROWS}
BY_TYPE = {row.model_type: row for row in ROWS}

# The linear layers of a decoder layer, and where each stands in it; in transformers' order.
LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
ALL_LINEAR = tuple(LINEARS)
# Those that have one input.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# SGLang's name of the module that several of them are in.
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}

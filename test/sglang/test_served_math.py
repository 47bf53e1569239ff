"""What training computes without an adapter, against SGLang's own forward, module and table, config
by config."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.scheduler.training.parity import Parity
from sglang_harli.peft_trainer.bare_forward import BareForward
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, bind
from sglang_harli.peft_trainer.layers.rotary import rotated
from sglang_harli.predictor.latency_predictor import LatencyPredictor

PROMPT = [token * 37 % 251 + 3 for token in range(90)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e4,
}

# arch, config, what --json-model-override-args changes
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 333, "vocab_size": 301}, {}),
    "llama with biases": ("llama", {"attention_bias": True}, {}),
    "llama, bias by its other name": (
        "llama",
        {"attention_bias": True},
        {"attention_bias": False, "bias": True},
    ),
    "mistral": ("mistral", {"head_dim": 24}, {}),
    "mistral with a window": ("mistral", {"sliding_window": 16}, {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {},
    ),
    "qwen3": ("qwen3", {"head_dim": 48}, {}),
    "qwen3 with windows": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        {},
    ),
    "attention dropout": ("llama", {"attention_dropout": 0.3}, {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, {}),
    "yarn": ("qwen3", {"rope_parameters": YARN}, {}),
    "yarn with attention_factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, {}),
    "yarn with attn_factor": ("qwen2", {"rope_parameters": {**YARN, "attn_factor": 0.7}}, {}),
    "yarn with mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}, {}),
    "yarn with betas": ("llama", {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2}}, {}),
    "yarn, not truncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, {}),
    "override: yarn": ("qwen3", {}, {"rope_scaling": YARN}),
    "override: yarn without a base": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"}},
    ),
    "override: rope_theta": ("qwen3", {}, {"rope_theta": 777.0}),
    "override: rope_parameters": (
        "llama",
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ),
    "override: epsilon": ("qwen3", {}, {"rms_norm_eps": 0.1}),
    "override: window": ("mistral", {"sliding_window": None}, {"sliding_window": 16}),
    "override: positions": ("llama", {}, {"max_position_embeddings": 1024}),
    "override: tied": ("llama", {}, {"tie_word_embeddings": True}),
    "override: fewer layers": ("llama", {}, {"num_hidden_layers": 1}),
}
EFFECTIVE = [name for name in CASES if name.startswith("override: ")]
for name in ("rope_theta", "window", "positions"):  # which SGLang itself passes over, here
    EFFECTIVE.remove(f"override: {name}")


def bound(runner: Any) -> FrozenBase:
    return bind(runner.model, runner.model_config.hf_config)


def trained_logprobs(base: FrozenBase, prompt: list[int], *, exact: bool = False) -> list[float]:
    """By the trainer's own layers, without an adapter."""
    forward = BareForward(base, prompt, 7, exact=exact)
    while not forward.finished:
        forward.run()
    found = forward.logprobs()
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_config_is_computed_as_it_is_served(
    name: str,
    tiny_model: Callable[..., str],
    sglang_runner: Callable[..., Any],
    served_logprobs: Callable[..., list[float]],
) -> None:
    arch, config, override = CASES[name]
    path = tiny_model(arch, **config)
    runner = sglang_runner(path, json_model_override_args=json.dumps(override))
    expected = torch.tensor(served_logprobs(runner, PROMPT))
    base = bound(runner)
    torch.testing.assert_close(torch.tensor(trained_logprobs(base, PROMPT)), expected, rtol=1e-5, atol=1e-5)
    if name in EFFECTIVE:  # without it other numbers come out
        plain = torch.tensor(served_logprobs(sglang_runner(path), PROMPT))
        assert (plain - expected).abs().mean() > 1e-3


@pytest.mark.parametrize(
    "name", [name for name in CASES if "yarn" in name or name in ("llama3", "dynamic", "linear")]
)
def test_rotation_is_that_of_the_served_module_at_every_position(
    name: str, tiny_model: Callable[..., str], sglang_runner: Callable[..., Any]
) -> None:
    arch, config, override = CASES[name]
    runner = sglang_runner(tiny_model(arch, **config), json_model_override_args=json.dumps(override))
    served = runner.model.model.layers[0].self_attn.rotary_emb
    base = bound(runner)
    count = base.positions
    assert count == len(served.cos_sin_cache) >= runner.model_config.context_len
    size = served.head_size
    query, key = torch.randn(count, 2 * size), torch.randn(count, size)
    expected = served.forward_native(torch.arange(count), query.clone(), key.clone())
    table = base.rotary().upto(count)
    for mine, theirs in zip((query, key), expected, strict=True):
        found = rotated(mine.view(1, count, -1, size), table)[0].transpose(0, 1).reshape(count, -1)
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_sixteen_bits_differ_by_their_rounding_alone(
    arch: str,
    dtype: str,
    tiny_model: Callable[..., str],
    sglang_runner: Callable[..., Any],
    served_logprobs: Callable[..., list[float]],
) -> None:
    runner = sglang_runner(tiny_model(arch, dtype=dtype, intermediate_size=333), enable_lora=True)
    base = bound(runner)
    served = torch.tensor(served_logprobs(runner, PROMPT))
    mine, exact = (torch.tensor(trained_logprobs(base, PROMPT, exact=exact)) for exact in (False, True))
    noise = (mine - exact).abs().mean()
    assert 0 < noise < 0.2
    assert (mine - served).abs().mean() <= 2 * noise
    assert (served - exact).abs().mean() <= 2 * noise


def test_in_single_precision_the_exact_forward_is_the_same(
    tiny_model: Callable[..., str], sglang_runner: Callable[..., Any]
) -> None:
    base = bound(sglang_runner(tiny_model("qwen2", intermediate_size=333)))
    mine, exact = (torch.tensor(trained_logprobs(base, PROMPT, exact=exact)) for exact in (False, True))
    torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_served_and_what_is_trained_agree_until_one_of_them_changes(
    arch: str,
    dtype: str,
    tiny_model: Callable[..., str],
    sglang_runner: Callable[..., Any],
    served_logprobs: Callable[..., list[float]],
) -> None:
    runner = sglang_runner(tiny_model(arch, dtype=dtype, vocab_size=301), enable_lora=True)
    base = bound(runner)

    def compared() -> Parity:
        parity = Parity(base, "refuse", head_tokens=16)
        parity.begin(PROMPT, served_logprobs(runner, PROMPT), 0)
        while (offer := parity.offer(LatencyPredictor())) is not None:
            parity.run(offer.candidates[-1][0])
        return parity

    parity = compared()
    assert parity.state == "agrees", parity.sentence()
    assert parity.difference <= (1e-5 if dtype == "float32" else 2 * parity.rounding)
    for place, field in (
        ("model.layers.1.input_layernorm", "weight"),
        ("model.layers.0.self_attn.attn", "scaling"),
    ):
        module = runner.model.get_submodule(place)
        before = getattr(module, field)
        setattr(module, field, torch.nn.Parameter(before * 2) if field == "weight" else before * 2)
        try:
            assert compared().state == "differs", place
        finally:
            setattr(module, field, before)
    table = runner.model.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    before = table.clone()
    table.mul_(0.9)
    try:  # training rotates by the very same table
        assert compared().state == "agrees"
    finally:
        table.copy_(before)


# ------------------------------------------------------------------ what is compared when a model is bound
@pytest.mark.parametrize(
    ("place", "field", "value", "named"),
    [
        (
            "model.layers.1.input_layernorm",
            "variance_epsilon",
            0.5,
            r"input_layernorm\.variance_epsilon is 0\.5",
        ),
        ("model.layers.0.self_attn.q_norm", "variance_epsilon", 0.5, r"q_norm\.variance_epsilon is 0\.5"),
        ("model.norm", "fp32_residual", True, r"model\.norm\.fp32_residual is True"),
        (
            "model.layers.0.self_attn.attn",
            "scaling",
            0.5,
            r"self_attn\.attn\.scaling is 0\.5.*computes with 0\.25",
        ),
        ("model.layers.1.self_attn.attn", "logit_cap", 30.0, r"attn\.logit_cap is 30\.0"),
        ("model.layers.1.self_attn.attn", "sliding_window_size", 128, r"attn\.sliding_window_size is 128"),
        ("model.layers.1.self_attn.attn", "tp_q_head_num", 8, r"attn\.tp_q_head_num is 8.*with 4"),
        ("model.layers.1.mlp", "act_fn", torch.nn.GELU(), r"mlp\.act_fn is 'GELU'.*'SiluAndMul'"),
        ("logits_processor", "final_logit_softcapping", 30.0, r"final_logit_softcapping is 30\.0"),
        ("logits_processor", "logit_scale", 0.5, r"logit_scale is 0\.5"),
        ("model.layers.0.self_attn.rotary_emb", "is_neox_style", False, r"is_neox_style is False"),
        ("model.layers.0.self_attn.rotary_emb", "rotary_dim", 8, r"rotary_dim is 8"),
        (
            "model.layers.1.self_attn",
            "rotary_emb",
            torch.nn.Identity(),
            r"another than that of the first layer",
        ),
    ],
)
def test_a_module_that_computes_otherwise_is_refused_with_both_values(
    place: str,
    field: str,
    value: Any,
    named: str,
    tiny_model: Callable[..., str],
    sglang_runner: Callable[..., Any],
) -> None:
    runner = sglang_runner(tiny_model("qwen3", head_dim=16))
    bound(runner)
    module = runner.model.get_submodule(place)
    before = getattr(module, field)
    setattr(module, field, value)
    try:
        with pytest.raises(UnsupportedError, match=rf"{named}.*--harli-finetune off"):
            bound(runner)
    finally:
        setattr(module, field, before)


def test_another_kind_of_rotary_embedding_is_refused(
    tiny_model: Callable[..., str], sglang_runner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = sglang_runner(tiny_model("qwen3", head_dim=16))
    rotary = runner.model.model.layers[0].self_attn.rotary_emb
    monkeypatch.setattr(rotary, "__class__", type("DualChunkRotaryEmbedding", (type(rotary),), {}))
    with pytest.raises(UnsupportedError, match="its rotary embedding is a DualChunkRotaryEmbedding"):
        bound(runner)

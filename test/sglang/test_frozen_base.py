"""The frozen base on real SGLang models of the CPU engine: shared storage, padding, wrappers,
refusals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_harli.errors import UnsupportedError
from sglang_harli.peft_trainer.base import base_print
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, bind, from_transformers
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.base_print import difference
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters

# arch, config: sizes that SGLang pads on a CPU (vocabulary to 64, intermediate to 32), grouped
# queries
MODELS = [
    ("llama", {"vocab_size": 500, "intermediate_size": 333}),
    ("llama", {"attention_bias": True, "mlp_bias": False, "num_key_value_heads": 1}),
    ("mistral", {"head_dim": 24, "num_key_value_heads": 4, "sliding_window": None}),
    ("qwen2", {"tie_word_embeddings": True, "vocab_size": 301, "intermediate_size": 200}),
    ("qwen3", {"head_dim": 48, "intermediate_size": 333}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
]


def storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def assert_shared(base: FrozenBase, served: nn.Module) -> None:
    """Every frozen parameter lies in a storage of the server's: not one byte of weights was
    copied."""
    ours = storages(base.model.parameters())
    theirs = storages(served.parameters())
    assert ours.keys() <= theirs.keys()
    assert sum(size for place, size in ours.items() if place not in theirs) == 0
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def assert_same_logits(base: FrozenBase, model_path: str, tolerance: float) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=base.dtype)
    ids = torch.arange(3, 23)[None] * 7 % base.config.vocab_size
    with torch.no_grad():
        expected = plain(input_ids=ids).logits.float()
        found = base.model(input_ids=ids).logits.float()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_print(base: FrozenBase, model_path: str) -> None:
    """Fused, padded and wrapped it has the print that transformers' own model has, in the same
    dtype and in others.

    The digest is that of the values: another one where they were rounded.  (float16 may hold those
    of bfloat16, or not: it has the bits, and not the range.)
    """
    served = base_print.take(base, "served", model_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
        found = base_print.take(from_transformers(plain), "plain", model_path)
        assert difference(served, found) == ""
        if (base.dtype, dtype) != (torch.bfloat16, torch.float16):
            rounded = torch.finfo(dtype).eps > torch.finfo(base.dtype).eps
            assert (found.digest == served.digest) == (not rounded)


@pytest.mark.parametrize(("arch", "config"), MODELS)
def test_every_weight_is_a_view_of_the_servers(
    arch: str, config: dict[str, Any], tiny_model: Callable[..., str], sglang_runner: Callable[..., Any]
) -> None:
    path = tiny_model(arch, **config)
    runner = sglang_runner(path)
    served, base = runner.model, bind(runner.model, runner.model_config.hf_config)
    assert_shared(base, served)
    assert_same_logits(base, path, 1e-5)
    assert_same_print(base, path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_and_layers_wrapped_for_lora(
    dtype: str, tiny_model: Callable[..., str], sglang_runner: Callable[..., Any]
) -> None:
    path = tiny_model("llama", dtype=dtype, intermediate_size=333)
    runner = sglang_runner(path, enable_lora=True)
    served = runner.model
    assert any("base_layer" in name for name, _ in served.named_modules())
    base = bind(served, runner.model_config.hf_config)
    assert base.dtype == getattr(torch, dtype)
    assert_shared(base, served)
    assert_same_logits(base, path, 0.0)
    assert_same_print(base, path)


def test_training_moves_the_adapter_and_leaves_the_weights_alone(
    tiny_model: Callable[..., str], sglang_runner: Callable[..., Any], greedy_tokens: Callable[..., Any]
) -> None:
    path = tiny_model("qwen3", head_dim=48, intermediate_size=333)
    runner = sglang_runner(path, enable_lora=True)
    before = {name: p.clone() for name, p in runner.model.named_parameters()}
    answer = greedy_tokens(runner, [[5, 6, 7]], 6)
    hp = Hyperparameters(learning_rate=1e-2, lr_scheduler="constant", warmup_ratio=0.0)
    with torch.inference_mode():  # as SGLang's loop may be
        base = bind(runner.model, runner.model_config.hf_config)
        spec = RunSpec(job="j", attempt=1, hyperparameters=hp, total_steps=5)
        run = TrainingRun(base, spec, logits_bytes=1 << 20)
        ids = np.array([9, 8, 7, 6, 5, 4, 3, 2] * 2, dtype=np.int32)
        losses = []
        for step in range(1, 6):
            batch = MicroBatch(
                job="j",
                attempt=1,
                cursor=BatchCursor(epoch=1, step=step, index=0),
                micro_batches=1,
                lengths=[11, 5],
                rows=[0, 1],
                step_target_tokens=14,
            )
            run.feed(*padded(batch, ids, ids))
            while (shape := run.peek()) is not None:
                run.run(shape.rows)
            losses += [m.loss for m in run.take_metrics()]
        run.release()
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(before[name], p) for name, p in runner.model.named_parameters())
    assert greedy_tokens(runner, [[5, 6, 7]], 6) == answer


class TestRefusals:
    """What cannot be bound is named, with the way out."""

    @pytest.fixture
    def path(self, tiny_model: Callable[..., str]) -> str:
        return tiny_model("llama")

    @pytest.fixture
    def config(self, path: str) -> Any:
        return AutoConfig.from_pretrained(path)

    @pytest.fixture
    def served(self, path: str, sglang_runner: Callable[..., Any]) -> Any:
        """A server's parameters by name, small enough to be bent: the fused layout, SGLang's other
        modules."""
        return _fused(AutoModelForCausalLM.from_pretrained(path), sglang_runner(path).model)

    def test_the_stand_in_itself_binds(self, served: Any, config: Any) -> None:
        assert_shared(bind(served, config), served)

    def test_wrong_shape(self, served: Any, config: Any) -> None:
        _set(served, "model.layers.1.self_attn.qkv_proj.weight", torch.zeros(96, 64))
        with pytest.raises(
            UnsupportedError, match=r"model\.layers\.1\.self_attn\.qkv_proj\.weight has 96 rows"
        ):
            bind(served, config)

    def test_cut_down(self, served: Any, config: Any) -> None:
        _set(served, "model.layers.0.mlp.down_proj.weight", torch.zeros(64, 90))
        with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.down_proj\.weight.*finetune off"):
            bind(served, config)

    def test_missing(self, served: Any, config: Any) -> None:
        del served.get_submodule("model.norm").weight
        with pytest.raises(UnsupportedError, match=r"no parameter model\.norm\.weight"):
            bind(served, config)

    def test_left_over(self, served: Any, config: Any) -> None:
        owner = served.get_submodule("model.layers.0.mlp.down_proj")
        owner.weight_scale = nn.Parameter(torch.ones(1))
        with pytest.raises(
            UnsupportedError, match=r"down_proj\.weight_scale of the served model has no place"
        ):
            bind(served, config)

    def test_another_dtype(self, served: Any, config: Any) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        _set(served, name, served.get_parameter(name).half())
        with pytest.raises(UnsupportedError, match=r"o_proj\.weight is torch\.float16"):
            bind(served, config)

    def test_packed_for_amx(self, served: Any, config: Any) -> None:
        served.get_submodule("model.layers.0.mlp.gate_up_proj").use_intel_amx_backend = True
        with pytest.raises(UnsupportedError, match=r"gate_up_proj\.weight is packed"):
            bind(served, config)

    def test_quantised(self, served: Any, config: Any) -> None:
        Fp8LinearMethod = type("Fp8LinearMethod", (), {})
        served.get_submodule("model.layers.0.mlp.gate_up_proj").quant_method = Fp8LinearMethod()
        with pytest.raises(UnsupportedError, match=r"gate_up_proj\.weight is quantised.*Fp8LinearMethod"):
            bind(served, config)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"architectures": ["GptOssForCausalLM"]}, "GptOssForCausalLM"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
            ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ],
    )
    def test_config(self, served: Any, change: dict[str, Any], named: str) -> None:
        config = SimpleNamespace(**{"architectures": ["LlamaForCausalLM"], **change})
        with pytest.raises(UnsupportedError, match=named):
            bind(served, config)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _fused(model: Any, sglang: Any) -> nn.Module:
    """transformers' weights in SGLang's layout, and those of SGLang's modules that have none."""
    model.logits_processor = sglang.logits_processor
    for layer, theirs in zip(model.model.layers, sglang.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        attention.attn, attention.rotary_emb = theirs.self_attn.attn, theirs.self_attn.rotary_emb
        mlp.act_fn = theirs.mlp.act_fn
        attention.qkv_proj = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        mlp.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _norm(module))
    return model


def _norm(module: Any) -> nn.Module:
    from sglang.srt.layers.layernorm import RMSNorm

    norm = RMSNorm(len(module.weight), eps=module.variance_epsilon)
    norm.weight = module.weight
    return norm


def _joined(linears: list[nn.Linear]) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    return module

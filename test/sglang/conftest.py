"""Pieces of a real SGLang on its CPU engine, in this process.

``sglang_runner(model_path, **server_args)`` gives a ``ModelRunner`` that has loaded the model and
allocated its pools; ``greedy_tokens`` generates with it; ``tiny_model`` writes small random models
to disk.
"""

from __future__ import annotations

import array
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sglang_harli.platforms.cpu.engine import CPU_ENGINE_ENV, STAND_IN
from support.model_runner import ALL_MODULES, NEWEST, build_runner, publish
from support.model_runner import server_args as make_server_args

# SGLang decides at import which engine it is; the stand-in for sgl_kernel has to come first on the
# path.
os.environ[CPU_ENGINE_ENV] = "1"
sys.path.insert(0, str(STAND_IN))


def pytest_collection_finish() -> None:
    os.environ.pop(CPU_ENGINE_ENV, None)  # tests of other folders start their own servers


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    os.environ[CPU_ENGINE_ENV] = "1"  # before any fixture, of whatever scope


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    os.environ.pop(CPU_ENGINE_ENV, None)


@pytest.fixture(scope="session")
def sglang_patches() -> None:
    """Every patch of ours, applied to this process as the plugin applies them."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_harli.patches import catalog

    catalog.register_all(HookRegistry)
    HookRegistry.apply_hooks()


# ------------------------------------------------------------------ models
@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``tiny_model(arch="llama", dtype="float32", seed=0, **config)`` -> folder with a random
    model.

    Defaults: hidden 64, 2 layers, 4 heads over 2 KV heads, intermediate 96, vocabulary 256; no
    tokenizer.
    """
    made: dict[str, str] = {}

    def make(arch: str = "llama", *, dtype: str = "float32", seed: int = 0, **config: Any) -> str:
        import torch
        import transformers

        key = repr((arch, dtype, seed, sorted(config.items())))
        if key in made:
            return made[key]
        values: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": 256,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.15,  # wide enough that greedy choices are not ties
        }
        values.update(config)
        config_class = {
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
        }[arch]
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**values))
        folder = tmp_path_factory.mktemp(f"{arch}-")
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        made[key] = str(folder)
        return made[key]

    return make


# ------------------------------------------------------------------ runners
@pytest.fixture(scope="session")
def sglang_runner(sglang_patches: None) -> Iterator[Callable[..., Any]]:
    """``sglang_runner(model_path, **server_args)`` -> a real ``ModelRunner`` on the CPU engine.

    ``enable_lora=True`` adds SGLang's LoRA serving (rank 16, all seven modules, 4 slots) unless
    told otherwise; the dtype is the one that the model was saved in.  Equal arguments give the same
    runner: tests that load adapters use fresh ids and names.
    """
    built: dict[str, Any] = {}

    def make(model_path: str, **server_args: Any) -> Any:
        key = repr((model_path, sorted(server_args.items())))
        if key not in built:
            built[key] = build_runner(make_server_args(model_path, **server_args))
        return built[key]

    yield make
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()


# ------------------------------------------------------------------ generation
def _greedy(
    runner: Any, prompts: list[list[int]], max_new_tokens: int, lora_ids: list[str | None] | None = None
) -> list[list[int]]:
    import torch
    from sglang.benchmark.one_batch import decode, extend

    requests = _requests(runner, prompts, max_new_tokens, lora_ids)
    with torch.no_grad():
        tokens, _, batch = extend(requests, runner)
        rows = [tokens.tolist()]
        for _ in range(max_new_tokens - 1):
            tokens, _ = decode(tokens, batch, runner)
            rows.append(tokens.tolist())
    return [list(column) for column in zip(*rows, strict=True)]


def _requests(
    runner: Any, prompts: list[list[int]], max_new_tokens: int, lora_ids: list[str | None] | None = None
) -> list[Any]:
    """On empty pools."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    publish(runner.server_args)
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests = []
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        request = Req(
            rid=str(index),
            origin_input_text="",
            origin_input_ids=array.array("q", prompt),
            sampling_params=params,
            lora_id=lora_ids[index] if lora_ids else None,
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        if NEWEST:
            request.extend_end = len(prompt)
        else:
            request.set_extend_range(0, len(prompt))
        requests.append(request)
    return requests


@pytest.fixture(scope="session")
def greedy_tokens() -> Callable[..., list[list[int]]]:
    """``greedy_tokens(runner, prompts, max_new_tokens, lora_ids=None)`` -> new token ids of each
    prompt.

    The prompts (lists of ids) run as one batch, through prefill and decode of SGLang's own runner;
    end tokens do not end a row.
    """
    return _greedy


def _logprobs(runner: Any, prompt: list[int]) -> list[float]:
    import torch
    from sglang.benchmark.one_batch import extend

    found: list[torch.Tensor] = []
    hook = runner.model.model.register_forward_hook(lambda module, args, out: found.append(out))
    try:
        extend(_requests(runner, [prompt], 1), runner)
    finally:
        hook.remove()
    head = runner.model.lm_head.weight[: runner.model_config.vocab_size]
    logits = (found[0][:-1] @ head.T).float()
    return logits.log_softmax(-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()


@pytest.fixture(scope="session")
def served_logprobs() -> Callable[[Any, list[int]], list[float]]:
    """``served_logprobs(runner, prompt)`` -> of each id but the first, by a prefill of SGLang's own
    runner."""
    return _logprobs


# ------------------------------------------------------------------ adapters
@dataclass(frozen=True)
class PeftAdapter:
    """A random adapter as PEFT saved it, and what it answers under plain transformers."""

    folder: str
    config: dict[str, Any]
    tensors: dict[str, Any]
    greedy: Callable[[list[list[int]], int], list[list[int]]]


@pytest.fixture(scope="session")
def peft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PeftAdapter]:
    """``peft_adapter(model_path, modules=ALL, rank=8, alpha=16, seed=1, use_rslora=False)``; B is
    not zero."""

    def make(
        model_path: str,
        modules: tuple[str, ...] = ALL_MODULES,
        rank: int = 8,
        alpha: int = 16,
        seed: int = 1,
        use_rslora: bool = False,
    ) -> PeftAdapter:
        import peft
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(model_path)
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(modules),
            use_rslora=use_rslora,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("adapter-")
        model.save_pretrained(folder)

        def greedy(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
            answers = []
            for prompt in prompts:
                ids = torch.tensor([prompt])
                for _ in range(max_new_tokens):
                    with torch.no_grad():
                        choice = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
                    ids = torch.cat([ids, choice], dim=1)
                answers.append(ids[0, len(prompt) :].tolist())
            return answers

        config = json.loads((folder / "adapter_config.json").read_text())
        return PeftAdapter(str(folder), config, load_file(folder / "adapter_model.safetensors"), greedy)

    return make

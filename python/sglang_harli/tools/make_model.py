"""A small model with tokenizer and chat template, for trying things out (``harli make-model``).

The weights are pretrained in place on generated text (``toy_text``): LoRA alone cannot teach a
purely random base.  The number of steps depends on the arguments only, never on the clock, so the
same arguments give the same model on the same machine.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli.architectures import BY_TYPE
from sglang_harli.errors import ConfigError
from sglang_harli.managers.http.start_up import user_caches
from sglang_harli.tools.toy_text import ToyFacts

ARCHITECTURES = tuple(BY_TYPE)
DTYPES = ("float32", "bfloat16", "float16")

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
# Every boundary is a special token, so that a prompt's tokens never depend on what follows it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ ': give system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Size:
    """A shape; ``vocab`` is the tokenizer's target.  ``steps_per_s`` (two cores) turns ``seconds``,
    by default ``default_s``, into pretraining steps."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int
    tied: bool
    steps_per_s: float
    default_s: float
    padded_vocab: int | None = None  # the model's, where it is larger than the tokenizer's


SIZES = {
    "tiny": Size(256, 4, 4, 2, 704, 1024, 2048, False, 8.0, 12.0),
    "25m": Size(512, 8, 8, 4, 1408, 4096, 4096, True, 1.2, 120.0),
    "100m": Size(768, 12, 12, 4, 2048, 8192, 4096, True, 0.3, 600.0),
    "1b": Size(2048, 16, 32, 8, 8192, 8192, 8192, True, 0.03, 0.0, 128_256),
    "8b": Size(4096, 32, 32, 8, 14_336, 8192, 8192, False, 0.005, 0.0, 128_256),
}
ROWS = 16  # of one pretraining step
ROW_TOKENS = 48
LEARNING_RATE = 2e-3  # of a 256 wide model; falls with the width


def make_model(
    directory: str | Path,
    arch: str = "llama",
    *,
    size: str = "tiny",
    dtype: str = "float32",
    seed: int = 0,
    seconds: float | None = None,
    steps: int | None = None,
    weights: bool = True,
    overrides: dict[str, Any] | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a model folder that SGLang, transformers and the finetune service can load.

    Args:
        directory: made if missing; must be empty.
        arch, size, dtype: of ``ARCHITECTURES``, ``SIZES``, ``DTYPES`` (pretraining is in float32).
        seed: of the text, the tokenizer, the weights and the order of the rows.
        seconds: about how long to pretrain on two cores (it sets a fixed number of steps; default:
            by size, 12 for tiny); 0 leaves the weights random.
        steps: the number of pretraining steps itself, instead of ``seconds``.
        weights: False: configuration and tokenizer only, for SGLang's ``--load-format dummy``.
        overrides: fields of the transformers configuration, for example ``intermediate_size``.
        report: called with a line of progress now and then.

    Returns ``path, arch, size, dtype, parameters, vocab_size, steps, loss, seconds``; ``loss`` is
    None without pretraining.  ConfigError: a bad argument, or the folder is not empty.
    """
    _check(arch, size, dtype, seed, seconds, steps)
    path = _empty_folder(directory)
    shape = SIZES[size]
    if steps is None:
        steps = round((shape.default_s if seconds is None else seconds) * shape.steps_per_s)
    began = time.monotonic()
    report = report or (lambda line: None)
    for line in user_caches.provide():  # before torch is imported
        report(line)
    facts = ToyFacts(seed)
    tokenizer = _tokenizer(facts, shape, seed)
    config = _config(arch, shape, tokenizer, dtype, overrides or {})
    tokenizer.save_pretrained(path)
    made: dict[str, Any] = {"path": str(path), "arch": arch, "size": size, "dtype": dtype}
    made |= {"vocab_size": config.vocab_size, "parameters": None, "steps": 0, "loss": None}
    if weights:
        model = _random_model(config, seed)
        made |= {"parameters": model.num_parameters(), "steps": steps}
        if steps:
            made["loss"] = _pretrain(model, tokenizer, facts, steps, seed, report)
        _save_weights(model, path, dtype)
    else:
        config.save_pretrained(path)
    _write_generation_config(path, tokenizer)
    return made | {"seconds": round(time.monotonic() - began, 1)}


def _check(arch: str, size: str, dtype: str, seed: int, seconds: float | None, steps: int | None) -> None:
    for name, value, accepted in (
        ("arch", arch, ARCHITECTURES),
        ("size", size, tuple(SIZES)),
        ("dtype", dtype, DTYPES),
    ):
        if value not in accepted:
            raise ConfigError(
                f"{name}={value!r} is not accepted: give one of {', '.join(accepted)}", param=name
            )
    if seconds is not None and not 0 <= seconds <= 86_400:
        raise ConfigError(f"seconds={seconds!r} is not accepted: give 0 to 86,400", param="seconds")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r} is not accepted: give 0 to {2**63 - 1:,}", param="seed")
    if steps is not None and steps < 0:
        raise ConfigError(f"steps={steps!r} is not accepted: give 0 or more", param="steps")


def _empty_folder(directory: str | Path) -> Path:
    try:
        str(directory).encode()
        path = Path(os.path.expanduser(directory)).resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} exists and is not an empty folder: give another path or empty it", param="directory"
            )
        path.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:  # what writes tokenizers takes no other names
        raise ConfigError(
            f"{str(directory)!r} is not accepted: give a path in UTF-8", param="directory"
        ) from error
    except (OSError, RuntimeError) as error:  # no home folder, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{directory} cannot be made ({reason}): give a folder that can be written", param="directory"
        ) from error
    return path


def _tokenizer(facts: ToyFacts, shape: Size, seed: int) -> Any:
    """Byte-level BPE learnt from the generated text; any string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, END_OF_TURN, *ROLE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = facts.lines(4000, seed)
    if shape.vocab > 2048:  # one set of facts has too few words for that many merges
        for other in range(1, 9):
            lines += ToyFacts(seed + 7919 * other).lines(1000, seed)
    core.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(ROLE_TOKENS),
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(arch: str, shape: Size, tokenizer: Any, dtype: str, overrides: dict[str, Any]) -> Any:
    import torch
    import transformers

    row = BY_TYPE[arch]
    values: dict[str, Any] = {
        "vocab_size": shape.padded_vocab or len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied or arch == "qwen2",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "use_cache": True,
    }
    if arch == "mistral":
        values["sliding_window"] = None
    if not row.own_head_dim:
        del values["head_dim"]
    values.update(overrides)
    config = getattr(transformers, row.config)(**values)
    config.architectures = [row.name]
    config.dtype = getattr(torch, dtype)
    return config


def _random_model(config: Any, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _rows(facts: ToyFacts, tokenizer: Any, seed: int, count: int) -> list[list[int]]:
    """Token ids of conversations (nine in ten) and running text, each closed by its end token."""
    rng = random.Random(f"toy-rows-{seed}")
    rows = []
    for _ in range(count):
        if rng.random() < 0.9:
            text = tokenizer.apply_chat_template(facts.conversation(rng), tokenize=False)
        else:
            text = facts.paragraph(rng) + END_OF_TEXT
        rows.append(tokenizer.encode(text, add_special_tokens=False)[:ROW_TOKENS])
    return rows


def _pretrain(
    model: Any, tokenizer: Any, facts: ToyFacts, steps: int, seed: int, say: Callable[[str], None]
) -> float:
    """Causal-LM training in place; every token counts.  Returns the last steps' mean loss."""
    import torch

    threads = torch.get_num_threads()
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        torch.set_num_threads(1)  # threads that wait for each other on busy cores are slower than one
    try:
        return _train(model, _rows(facts, tokenizer, seed, ROWS * steps), steps, say)
    finally:
        torch.set_num_threads(threads)


def _train(model: Any, rows: list[list[int]], steps: int, say: Callable[[str], None]) -> float:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    rate = LEARNING_RATE * min(1.0, 256 / model.config.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    losses: list[float] = []
    say(f"{model.num_parameters() / 1e6:.1f}M parameters; pretraining for {steps} steps")
    model.train()
    for step in range(steps):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 5) == 0:
            say(f"step {step + 1}/{steps}, loss: {losses[-1]:.2f}")
    recent = losses[-10:]
    return round(sum(recent) / len(recent), 3)


def _save_weights(model: Any, path: Path, dtype: str) -> None:
    import torch
    from transformers.utils import logging

    model.eval()
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one shard: a bar is noise
    try:
        model.save_pretrained(path)
    finally:
        if bars:
            logging.enable_progress_bar()
    mode = (path / "config.json").stat().st_mode & 0o777
    for weights in path.glob("*.safetensors"):
        weights.chmod(mode)  # safetensors makes them readable for their owner alone


def _write_generation_config(path: Path, tokenizer: Any) -> None:
    """Both ends stop generation: the end of a turn in a chat, the end of text elsewhere."""
    values = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.bos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    (path / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n")

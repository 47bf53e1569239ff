"""Tiny random models with a tokenizer and a chat template, made in a folder: what real servers are
tried on."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
# Ends in a newline, not a space: a space at the seam would be tokenized with the word behind it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(
    folder: str | Path,
    arch: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> str:
    """Write a random model with its tokenizer into ``folder`` and return the folder.

    Args:
        arch: llama, mistral, qwen2 (biases, tied embeddings) or qwen3 (q and k norms).
        dtype: float32, bfloat16 or float16.
        seed: of the weights and of the text that the tokenizer is trained on.
        config: fields of the transformers config; the defaults are 64 wide, 2 layers, 4 heads over
            2 KV heads, an intermediate size of 333 and a vocabulary of 509, both of which SGLang
            pads on a CPU.
    """
    import torch
    import transformers

    values = _defaults(arch) | config
    config_class = getattr(transformers, f"{arch.capitalize()}Config")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**values))
    folder = Path(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, vocab_size=values["vocab_size"], seed=seed)
    return str(folder)


def _defaults(arch: str) -> dict[str, Any]:
    if arch not in ARCHITECTURES:
        raise ValueError(f"{arch!r} is not one of {', '.join(ARCHITECTURES)}")
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 333,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 509,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": arch == "qwen2",
        "initializer_range": 0.15,  # wide enough that greedy choices are not ties
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if arch in ("mistral", "qwen3"):
        values["head_dim"] = 16
    if arch == "mistral":
        values["sliding_window"] = None
    return values


def write_tokenizer(folder: Path, *, vocab_size: int, seed: int = 0) -> None:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens, with the chat template."""
    text = trained_bpe(vocab_size, seed)
    (folder / "tokenizer.json").write_text(text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": END_OF_TURN,
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


@cache
def trained_bpe(vocab_size: int, seed: int, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> str:
    """The JSON of a byte-level BPE tokenizer; the special tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(random.Random(seed)), trainer)
    return tokenizer.to_str()


def _text(rng: random.Random) -> list[str]:
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=12)) + rng.choice(".?!") for _ in range(400)]

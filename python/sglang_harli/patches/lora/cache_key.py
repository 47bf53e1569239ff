"""Runtime half of ``patches/11-lora-cache-key``: no client's ``extra_key`` is an adapter's key.

SGLang's prefix cache is divided by a string: the client's ``extra_key`` with the adapter's id
behind it.  A client that gives an adapter's id as ``extra_key`` gets answers of the base from the
adapter's keys and values.  Here the client's part is preceded by its length.

Leans on: ``srt.managers.tokenizer_manager.TokenizerManager`` (``_create_tokenized_object``,
``enable_lora``).
"""

from __future__ import annotations

from typing import Any


def _after_tokenized(tokenized: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    key = getattr(tokenized, "extra_key", None)  # requests for embeddings have none
    if key and manager.enable_lora:
        tokenized.extra_key = f"{len(key)}:{key}"


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = ((f"{_MANAGER}._create_tokenized_object", _after_tokenized, "after"),)

"""Runtime half of ``patches/11-lora-cache-key``: no client's ``extra_key`` is an adapter's key.

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

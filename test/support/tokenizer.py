"""A small tokenizer in a folder, as the served model would have it; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.models import CHAT_TEMPLATE, write_tokenizer

MAX_LENGTH = 256


def make_tokenizer_folder(folder: Path, template: str = CHAT_TEMPLATE, **settings: Any) -> Path:
    """tokenizer.json, tokenizer_config.json and a config.json that limits rows to MAX_LENGTH
    tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocab_size=400)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | settings))
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": MAX_LENGTH, "model_type": "llama"})
    )
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)

"""Files of a model: in its folder, or in the hub's cache on this machine."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import HarliError
from sglang_harli.service.tokenizer import hidden_torch

LENGTH_KEYS = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)


def find(model: str, name: str, revision: str | None = None) -> Path | None:
    """A file of ``model`` (a folder or a hub id), None where it is not on this machine."""
    folder = Path(os.path.expanduser(model))
    if folder.is_dir() or model.startswith(("/", ".", "~")):
        return folder / name if (folder / name).is_file() else None
    hidden_torch.import_transformers()  # it imports the hub's client too
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:  # no folder, and no hub id either
        return None
    return Path(found) if isinstance(found, str) else None


def read_json(model: str, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """A file's content, None where it is not on this machine; HarliError: it is no JSON object."""
    path: Path | str = os.path.join(model, name)
    try:
        found = find(model, name, revision)
        if found is None:
            return None
        path = found
        content = json.loads(found.read_bytes())
    except OSError as error:
        raise HarliError(f"{path} cannot be read: {error.strerror}", code="bad_model") from error
    except RecursionError as error:
        raise HarliError(f"{path} is nested too deeply", code="bad_model") from error
    except ValueError as error:
        raise HarliError(f"{path} is not JSON: {error}", code="bad_model") from error
    if not isinstance(content, dict):
        raise HarliError(f"{path} is not a JSON object", code="bad_model")
    return content


def context_length(model: str, revision: str | None = None) -> int | None:
    """The longest row by config.json, as SGLang derives it; None where the file is not here."""
    config = read_json(model, "config.json", revision)
    if config is None:
        return None
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    length = next((text[key] for key in LENGTH_KEYS if _is_count(text.get(key))), None)
    if length is None:
        return None
    scaling = text.get("rope_scaling")
    factor = scaling.get("factor", 1) if isinstance(scaling, dict) else 1
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
        if "original_max_position_embeddings" in scaling or kind == "llama3":
            factor = 1
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        return length
    return int(length * factor)


def stop_ids(model: str, revision: str | None = None) -> set[int]:
    """``eos_token_id`` of config.json and generation_config.json."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = (read_json(model, name, revision) or {}).get("eos_token_id")
        found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def model_length(flags: TokenizerFlags) -> int | None:
    """The longest row by ``--context-length``, else ``context_length``; raises HarliError."""
    if flags.context_length is not None:
        return flags.context_length
    return context_length(flags.model_path, flags.revision)

"""Checks ``--lora-paths`` before the model loads, so that a bad adapter is one sentence.

As every later load does (``patches.lora.peft_adapter``), on the files' headers.  Leans on
ServerArgs: lora_paths, enable_lora, max_lora_rank, lora_target_modules and get_model_config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sglang_harli.errors import UnsupportedError
from sglang_harli.patches.lora import peft_adapter
from sglang_harli.sglang_versions.current import arguments

FLAG = "--lora-paths"


def check_lora_paths(server_args: Any) -> None:
    """Check each adapter; UnsupportedError names the entry, and the field or weight at fault."""
    args = arguments.in_force(server_args)
    entries = list(_entries(args.lora_paths))
    if not entries or args.enable_lora is False:
        return
    config = arguments.model_config(server_args).hf_config
    model = peft_adapter.model_of(config.get_text_config() if hasattr(config, "get_text_config") else config)
    names: set[str] = set()
    for name, path in entries:
        where = f"{FLAG} {name}" if name == path else f"{FLAG} {name}={path}"
        if name in names:
            raise UnsupportedError(f"{where}: the name {name!r} is given twice", param=FLAG)
        names.add(name)
        try:
            _check(_folder(path), model, args.max_lora_rank, args.lora_target_modules)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnsupportedError(f"{where}: {_one_line(error)}", param=FLAG) from error


def _entries(lora_paths: Any) -> Iterator[tuple[str, str]]:
    """(name, path) of each, in the forms that SGLang takes."""
    if isinstance(lora_paths, dict):
        yield from lora_paths.items()
        return
    for entry in lora_paths or ():
        if isinstance(entry, str):
            name, equals, path = entry.partition("=")
            yield name, path if equals else name
        elif isinstance(entry, dict):
            yield entry.get("lora_name", ""), entry.get("lora_path", "")
        else:  # SGLang's LoRARef
            yield entry.lora_name, entry.lora_path


def _folder(path: str) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UnsupportedError("it is a file; give the folder that has adapter_config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"there is no such folder, and no adapter of this name on the hub ({_one_line(error)})"
        ) from error


def _check(
    folder: Path, model: peft_adapter.Model, max_rank: int | None, served: Iterable[str] | None
) -> None:
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    try:
        config = peft_adapter.checked_config(json.loads(text))
    except json.JSONDecodeError as error:
        raise UnsupportedError(f"adapter_config.json is not JSON: {error}") from error
    peft_adapter.check_limits(config, max_rank, served)
    weights = _weights(folder)
    if weights is not None:
        peft_adapter.check_weights(config, weights, model)


def _weights(folder: Path) -> list[tuple[str, tuple[int, ...]]] | None:
    """Names and shapes of what SGLang will read; None: they come from the hub with the model."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [weight for file in files for weight in peft_adapter.safetensors_weights(file)]
    if (folder / "adapter_model.bin").exists():
        return _pickled(folder)
    if (folder / "adapter_config.json").is_symlink():  # the hub's cache
        return None
    raise UnsupportedError("there is no adapter_model.safetensors")


def _pickled(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of PEFT's older form; PEFT's own reader takes tensors and runs no code."""
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="meta")
        return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    except Exception as error:  # boundary: an unreadable file is one sentence; the start ends in order
        raise UnsupportedError(f"adapter_model.bin cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]

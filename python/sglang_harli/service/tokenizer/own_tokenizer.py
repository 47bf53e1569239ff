"""The tokenizer and chat template that a server with the same flags has, loaded by their path.

For what is asked before the server has handed over its own (tokenizer_state.py), and without a
server.  Follows SGLang without importing it: ``hf_transformers/tokenizer.py``,
``parser/template_manager.py`` and the guesses by path in ``parser/conversation.py``.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import HarliError
from sglang_harli.protocol.tokenizer_state import ChatTemplate
from sglang_harli.service.rows import content_format
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer, describe
from sglang_harli.service.tokenizer import hidden_torch, model_files

# Tokens at which SGLang stops with any model that has them.
_MORE_STOPS = ("<|eom_id|>", "<|content_model_end_sampling|>")
_FILES = (".json", ".txt", ".j2", ".jinja2")  # endings by which --chat-template names a file
# Paths of trainable models for which SGLang takes a conversation template of its own.
_OWN_TEMPLATES = (
    (r"\bpoints\b", "points-v15-chat"),
    (r"moss.*vl|moss-vl", "moss-vl"),
    (r"internvl", "internvl-2-5"),
    (r"janus", "janus-pro"),
    (r"vicuna|llava-v1\.5|llava-next-video-7b", "vicuna_v1.1"),
    (r"deepseek.*vl2", "deepseek-vl2"),
    (r"llava-v1\.6-34b|llava-v1\.6-yi-34b|llava-next-video-34b|llava-onevision-qwen2", "chatml-llava"),
    (r"minicpm-v(?!-4[._]6)", "minicpmv"),
    (r"minicpm-o(?!-4[._]6)", "minicpmo"),
    (r"phi-4-multimodal", "phi-4-mm"),
    (r"deepseek-ocr", "deepseek-ocr"),
    (r"unlimited", "unlimited-ocr"),
    (r"paddleocr", "paddle-ocr"),
    (r"whisper", "whisper"),
)
# Classes whose tokenizer_config.json has add_bos_token, which transformers 5 drops.
_BOS_CLASSES = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
    *("GemmaTokenizer", "GemmaTokenizerFast", "CohereTokenizerFast"),
)
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError)


def load(flags: TokenizerFlags) -> ServedTokenizer:
    """Blocking: the first call imports transformers and reads the files.  Raises HarliError."""
    tokenizer = load_tokenizer(flags)
    chat = chat_template(flags, tokenizer)
    stops = model_files.stop_ids(flags.model_path, flags.revision)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    stops |= {added[text] for text in _MORE_STOPS if text in added}
    return ServedTokenizer(describe(tokenizer, chat, sorted(stops)), tokenizer)


def load_tokenizer(flags: TokenizerFlags) -> Any:
    """A transformers tokenizer, as SGLang loads and repairs it; raises HarliError."""
    hidden_torch.import_transformers()
    from transformers import AutoTokenizer

    path = os.path.expanduser(flags.tokenizer_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            trust_remote_code=flags.trust_remote_code,
            revision=flags.revision,
            use_fast=flags.tokenizer_mode != "slow",
            clean_up_tokenization_spaces=False,
        )
        _restore_components(tokenizer, path, flags.revision)
        _restore_bos(tokenizer, path, flags.revision)
        return tokenizer
    except _LOAD_ERRORS as error:
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise HarliError(
            f"the tokenizer of {flags.tokenizer_path} cannot be loaded: {reason}", code="bad_tokenizer"
        ) from error


def _restore_components(tokenizer: Any, path: str, revision: str | None) -> None:
    """Put back tokenizer.json's splitting, which transformers 5 rebuilds for the class."""
    backend, file = getattr(tokenizer, "_tokenizer", None), model_files.find(path, "tokenizer.json", revision)
    if backend is None or file is None:
        return
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    kinds = [type(t.pre_tokenizer).__name__ if t.pre_tokenizer else None for t in (raw, backend)]
    if None not in kinds and kinds[0] != kinds[1]:
        backend.pre_tokenizer, backend.decoder = raw.pre_tokenizer, raw.decoder


def _restore_bos(tokenizer: Any, path: str, revision: str | None) -> None:
    """Put back whether the tokenizer adds a beginning and an end of text."""
    from transformers import PreTrainedTokenizerFast

    file = model_files.find(path, "tokenizer_config.json", revision)
    config = json.loads(file.read_bytes()) if file is not None else {}
    if config.get("tokenizer_class") not in _BOS_CLASSES:
        return
    wanted = {"add_bos_token": config.get("add_bos_token"), "add_eos_token": config.get("add_eos_token")}
    wanted["add_bos_token"] = True if wanted["add_bos_token"] is None else wanted["add_bos_token"]
    if wanted["add_eos_token"] is None or isinstance(tokenizer, PreTrainedTokenizerFast):
        wanted["add_eos_token"] = False
    changed = {name: value for name, value in wanted.items() if getattr(tokenizer, name, None) != value}
    for name, value in changed.items():
        setattr(tokenizer, f"_{name}", value)
    if changed and hasattr(tokenizer, "update_post_processor"):
        tokenizer.update_post_processor()


# ------------------------------------------------------------------ the chat template
def chat_template(flags: TokenizerFlags, tokenizer: Any) -> ChatTemplate:
    """Raises HarliError: --chat-template's file cannot be read, or no template has that name."""
    kwargs = dict(flags.chat_template_kwargs)
    name = conversation_template(flags)
    if name is not None:
        if os.sep in name or Path(name).suffix in _FILES:
            _read(name)  # a conversation template in a file: an error where it cannot be read
        return ChatTemplate(kwargs=kwargs, refusal=own_template(name))
    if flags.chat_template:
        raw = _read(flags.chat_template)
        source: str | None = raw.replace("\\n", "\n")  # as SGLang reads it; it looks for the format before
    else:
        raw = source = _of_tokenizer(tokenizer, flags.hf_chat_template_name)
    found = content_format.detect(raw) if raw else content_format.STRING
    return ChatTemplate(source=source or None, content_format=found, kwargs=kwargs)


def own_template(name: str) -> str:
    """Why chats cannot be trained on where SGLang renders them by one of its own templates."""
    return (
        f"the server renders chats by SGLang's own template {name!r}, which training does not know: use 'prompt' and "
        "'completion', or start the server with --chat-template FILE.jinja"
    )


def conversation_template(flags: TokenizerFlags) -> str | None:
    """The template of SGLang's own (no Jinja) that a server with these flags uses, if any."""
    if flags.chat_template:
        return None if flags.chat_template.endswith(".jinja") else flags.chat_template
    for pattern, name in _OWN_TEMPLATES:
        if re.search(pattern, flags.model_path, re.IGNORECASE):
            return name
    return None


def _read(path: str) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text().strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise HarliError(f"--chat-template {path} cannot be read: {error}", code="bad_tokenizer") from error


def _of_tokenizer(tokenizer: Any, name: str | None) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, dict):
        return template
    if name and name not in template:
        known = ", ".join(template)
        raise HarliError(f"--hf-chat-template-name {name}: accepted: {known}", code="bad_tokenizer")
    return template[name] if name else next(iter(template.values()), None)

"""Hide torch from this process.

transformers imports torch wherever ``importlib.util.find_spec`` finds it, which takes seconds and
hundreds of MB for a tokenizer that never uses it.  Call ``hide`` before transformers is imported.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from importlib.machinery import ModuleSpec

_find_spec = importlib.util.find_spec
_importing = threading.Lock()
_HIDDEN = ("torch", "sglang")


def _without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
    if name.partition(".")[0] in _HIDDEN:
        return None
    return _find_spec(name, package)


def hide() -> None:
    """Make ``find_spec("torch")`` answer None from now on; may be called again."""
    importlib.util.find_spec = _without_torch
    # transformers says "PyTorch was not found" at its first import; here that is meant to be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # It warns of rows over its own limit ("indexing errors"): the model's is checked elsewhere.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A download's progress bars would break up a log, or a report's lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Rust threads of the tokenizer would compete with decode steps for cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def import_transformers() -> None:
    """Hide torch, and import what is used of transformers.  By one thread at a time: a second one
    would find it half made, or wait for the first for ever."""
    with _importing:
        hide()
        import huggingface_hub  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
        from transformers.utils import chat_template_utils  # noqa: F401

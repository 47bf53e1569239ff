"""The served model's tokenizer, loaded once and off the event loop."""

from __future__ import annotations

import threading

from sglang_harli.errors import HarliError
from sglang_harli.service import hidden_torch
from sglang_harli.service.chat_rows import RowTokenizer


class ModelTokenizer:
    """Args:
    path: local folder or hub id, as SGLang got it.
    """

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        self._path = path
        self._trust_remote_code = trust_remote_code
        self._lock = threading.Lock()
        self._loaded: RowTokenizer | None = None

    def get(self) -> RowTokenizer:
        """Blocking: the first call imports transformers (about 2 s) and reads the files.

        Raises:
            HarliError: it cannot be loaded.
        """
        with self._lock:
            if self._loaded is None:
                hidden_torch.hide()
                from transformers import AutoTokenizer

                try:
                    tokenizer = AutoTokenizer.from_pretrained(
                        self._path, trust_remote_code=self._trust_remote_code
                    )
                except (OSError, ValueError, KeyError, ImportError) as error:
                    raise HarliError(
                        f"the tokenizer of {self._path} cannot be loaded: {error}", code="bad_tokenizer"
                    ) from error
                self._loaded = RowTokenizer(tokenizer)
            return self._loaded

    def fingerprint(self) -> str:
        return self.get().fingerprint

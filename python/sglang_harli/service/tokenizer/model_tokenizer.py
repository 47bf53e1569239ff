"""The served model's tokenizer: the server's own once handed over, before that by its path."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import HarliError
from sglang_harli.protocol import tokenizer_state
from sglang_harli.protocol.tokenizer_state import TokenizerState
from sglang_harli.protocol.trouble import passes
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer
from sglang_harli.service.tokenizer import hidden_torch, model_files, own_tokenizer

logger = logging.getLogger(__name__)


class ModelTokenizer:
    """The tokenizer that makes rows; the server's own is handed over in ``run_dir``."""

    def __init__(self, flags: TokenizerFlags, run_dir: Path) -> None:
        self._flags = flags
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._own: RowEncoder | None = None
        self._served: RowEncoder | None = None
        self.expected: str | None = None  # its fingerprint; "": the server has none; None: not said yet
        self.lost = False  # it was said and could not be read

    @property
    def known(self) -> bool:
        """Whether it is known what serves: only then are rows trained on."""
        return self.expected == "" or (self._served is not None and self.expected is not None)

    def get(self) -> RowEncoder:
        """Blocking where it has to be loaded; raises HarliError: it cannot be."""
        served = self._served
        if served is not None:
            return served
        with self._lock:
            if self._own is None:
                self._own = RowEncoder(own_tokenizer.load(self._flags))
            return self._own

    def longest_row(self) -> int | None:
        """See ``model_files.model_length``.  Blocking."""
        return model_files.model_length(self._flags)

    def take(self, fingerprint: str) -> bool:
        """Read the server's own tokenizer; whether ``known`` or ``lost`` changed.  Blocking."""
        before = self.expected, self.lost
        if fingerprint == "" or (self._served is not None and self.expected == fingerprint):
            self.expected, self.lost = fingerprint, False
            return before != (fingerprint, False)
        try:
            state = tokenizer_state.read(self._run_dir)
            if state.fingerprint != fingerprint:
                raise ValueError("it is of another server")
            hidden_torch.import_transformers()
            served = RowEncoder(self._open(state))
        except (OSError, ValueError, MemoryError) as error:
            if not self.lost:
                logger.error("the server's tokenizer cannot be read: %s; it is asked for again", error)
            self.lost = True
            return before != (self.expected, True)
        self._served, self.expected, self.lost = served, fingerprint, False
        self._own = None  # a scan in progress keeps it until its end
        logger.info("rows are made with the server's own tokenizer and chat template")
        return True

    def _open(self, state: TokenizerState) -> ServedTokenizer:
        try:
            loaded = None
            if state.backend is None and state.refusal is None:
                loaded = own_tokenizer.load_tokenizer(self._flags)
            return ServedTokenizer(state, loaded)
        except Exception as error:  # boundary: rows are refused with its reason; the service goes on
            if passes(error):
                raise
            known = isinstance(error, HarliError | ValueError)
            kind = "" if known else f"{type(error).__name__}: "
            reason = f"this server's tokenizer cannot be used for training: {kind}{error}"
            logger.error("%s", reason, exc_info=not known)
            return ServedTokenizer(msgspec.structs.replace(state, backend=None, refusal=reason))

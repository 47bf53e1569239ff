"""The server's tokenizer and chat template as one file in the run directory.

The HTTP process writes it before the server serves and names its fingerprint in ``HttpHello``; the
finetune service makes rows with it, so training sees the ids that serving sees.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from sglang_harli.failpoints import WriteFailpoint, failpoint

RULES = 2  # how rows are made of a line; a change of it has stored rows made again
FILE = "tokenizer.state"


class ChatTemplate(Struct, frozen=True, kw_only=True):
    """How serving renders a chat.

    Attributes:
        source: the Jinja template in force; None: there is none.
        content_format: ``string`` or ``openai`` (see content_format.py).
        kwargs: what every request's template gets (``--default-chat-template-kwargs``).
        refusal: why chats cannot be trained on with this server; None: they can.
        form: of what a template gets of a request (``chat_fields.FORM`` of sglang_versions).
    """

    source: str | None = None
    content_format: str = "string"
    kwargs: dict[str, Any] = {}
    refusal: str | None = None
    form: str = ""


class Probe(Struct, frozen=True, kw_only=True):
    """A text and its ids from the server's tokenizer, with and without added special tokens."""

    text: str
    ids: list[int]
    plain: list[int]


class TokenizerState(Struct, frozen=True, kw_only=True):
    """All that turns a line of data into ids.

    Attributes:
        backend: the JSON of the tokenizers library; None: this tokenizer has none, so it is loaded
            by its path and has to give the ids of ``probes``.
        special_tokens: what templates see: bos_token, eos_token and so on.
        special_ids: control tokens.
        chat_adds_special: a rendered chat is encoded with the tokenizer's own special tokens.
        split_special: special tokens within a text are encoded as plain text.
        stop_ids: tokens at which serving ends an answer; empty: not known.
        chat_probe: the template's output for a chat with ``probes[0].text``; None: it refuses it.
        vocabulary: a digest, where there is no backend.
        refusal: why no row can be made with this server; None: rows can.
    """

    chat: ChatTemplate
    backend: str | None = None
    special_tokens: dict[str, str] = {}
    special_ids: list[int] = []
    eos_id: int | None = None
    chat_adds_special: bool = False
    split_special: bool = False
    stop_ids: list[int] = []
    probes: list[Probe] = []
    chat_probe: str | None = None
    vocabulary: str = ""
    refusal: str | None = None

    @property
    def fingerprint(self) -> str:
        """Differs where a row's ids would."""
        parts = (
            *(
                RULES,
                self.backend,
                self.vocabulary,
                sorted(self.special_tokens.items()),
                sorted(self.special_ids),
            ),
            *(self.eos_id, self.chat_adds_special, self.split_special, self.refusal),
            *(self.chat.source, self.chat.content_format, self.chat.refusal),
            msgspec.json.encode(self.chat.kwargs, order="sorted"),
            [] if self.backend else [(p.text, p.ids, p.plain) for p in self.probes],
            *([self.chat.form] if self.chat.form else ()),
        )
        return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]


def encode(state: TokenizerState) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(state), 1)


def write(run_dir: str | Path, content: bytes) -> None:
    """Put an encoded state into the run directory, durably, at once; OSError: the disk refuses."""
    failpoint(WriteFailpoint.TOKENIZER)
    path = Path(run_dir) / FILE
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read(run_dir: str | Path) -> TokenizerState:
    """Raises OSError or ValueError: it is not there, or not what was written."""
    content = (Path(run_dir) / FILE).read_bytes()
    try:
        return msgspec.msgpack.decode(zlib.decompress(content), type=TokenizerState)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(f"{FILE} in the run directory is damaged: {error}") from error

"""Ids of a text that grows: what was encoded before is not encoded again.

A conversation's turns are texts that each begin with the one before: encoding each whole would take
quadratic time.  A special token that the tokenizer takes out of the raw text first separates what
is on its two sides: up to such a token, what is common with an earlier text keeps its ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_harli.service.rows.served_tokenizer import BackendEncoder, ServedTokenizer


@dataclass(frozen=True, slots=True)
class _Known:
    """The text's first ``length`` characters, ending in the border ``token``: ``count`` ids."""

    length: int
    count: int
    token: str


class GrowingText:
    """The rendered text of a conversation, message by message.  ``ids``: of the text encoded last,
    as ``ServedTokenizer.encode_chat`` gives them."""

    def __init__(self, tokenizer: ServedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""  # the one encoded last; only it is kept, its beginnings may be many
        self._known: list[_Known] = []  # of its beginnings, each longer than the one before
        self._borders = _borders(tokenizer)
        self.ids: list[int] = []

    def encode(self, text: str) -> int:
        """Encode ``text``; returns how many of the first ids were not touched."""
        common = _common(self._text, text)
        while self._known and self._known[-1].length > common:
            self._known.pop()
        self._text = text
        known = self._known[-1] if self._known else _Known(0, 0, "")
        kept = max(known.count - 1, 0)
        del self.ids[kept:]
        start = known.length - len(known.token)
        if self._borders:
            self._add(text, start)
        else:
            self.ids += self._tokenizer.encode_chat(text)
        return kept

    def _add(self, text: str, start: int) -> None:
        """Encode ``text`` from ``start`` (its beginning, or a border); note its last border."""
        encoder = self._tokenizer.encoder
        assert isinstance(encoder, BackendEncoder)
        before = len(self.ids)
        found = encoder.encoding(text[start:], special=False)
        self.ids += found.ids
        offsets = found.offsets
        for at in range(len(offsets) - 1, 0, -1):
            token = self._borders.get(self.ids[before + at])
            first, last = offsets[at]
            if token is not None and text[start + first : start + last] == token:
                self._known.append(_Known(start + last, before + at + 1, token))
                return


def _common(old: str, new: str) -> int:
    """How many first characters two texts have in common."""
    least, most = 0, min(len(old), len(new))
    if new.startswith(old):
        return most
    while least < most:
        middle = (least + most + 1) // 2
        if old[least:middle] == new[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _borders(tokenizer: ServedTokenizer) -> dict[int, str]:
    """Tokens taken out of the raw text that take nothing around them along and are part of no other
    such token; none where a chat is encoded differently piece by piece."""
    encoder = tokenizer.encoder
    if not isinstance(encoder, BackendEncoder) or encoder.backend.encode_special_tokens:
        return {}
    if tokenizer.chat_adds_special and encoder.encode("a", special=True) != encoder.encode(
        "a", special=False
    ):
        return {}
    added = encoder.backend.get_added_tokens_decoder()
    all_texts = [token.content for token in added.values()]
    return {
        number: token.content
        for number, token in added.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and sum(token.content in text for text in all_texts) == 1
    }

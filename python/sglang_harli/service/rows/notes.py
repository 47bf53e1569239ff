"""Remarks on a data file that is accepted: said once per file, beside its figures."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from sglang_harli.service.rows.served_tokenizer import ServedTokenizer

ANSWERS_APART = "answers_apart"
MAX_NAMES = 20
MAX_NAME = 64


class Note(Struct, frozen=True, kw_only=True):
    """One remark on a data file."""

    code: str  # what it is about, fixed
    text: str
    names: list[str] = []  # fields, roles or tokens
    line: int | None = None  # where it was met first: the line, or the row where rows are no lines


class RowNotes:
    """Collects while a file is read; ``line`` is the one that is being read, or the row where a
    file's rows are no lines (``unit``)."""

    def __init__(self, unit: str = "line") -> None:
        self.line = 0
        self._unit = unit
        self._names: dict[str, dict[str, int]] = {}  # code -> name -> line
        self._looks: dict[str, int] = {}

    def add(self, code: str, names: Iterable[str] = ("",)) -> None:
        known = self._names.setdefault(code, {})
        for name in names:
            shown = name.encode("utf-8", "backslashreplace").decode()[:MAX_NAME]  # it may come with the data
            if len(known) < MAX_NAMES:
                known.setdefault(shown, self.line)

    def worth_a_look(self, what: str, most: int = 3) -> bool:
        """Whether ``what`` was looked at fewer than ``most`` times: looking costs a rendering."""
        self._looks[what] = self._looks.get(what, 0) + 1
        return self._looks[what] <= most

    def ended(self, token: int, name: str, tokenizer: ServedTokenizer) -> None:
        """An answer whose last learned token is ``token``."""
        if tokenizer.stop_ids and token not in tokenizer.stop_ids:
            self.add("end_is_no_stop", [name])

    def notes(self) -> list[Note]:
        made = []
        for code, sentence in _SENTENCES.items():
            found = self._names.get(code)
            if not found:
                continue
            names = [name for name in found if name]
            line = min(found.values())
            text = sentence.format(names=", ".join(names), where=f"{self._unit} {line}")
            made.append(Note(code=code, text=text, names=names, line=line))
        return made


_SENTENCES = {
    ANSWERS_APART: "the chat template ends answers without a token of their own, or a token spans the seam to the next "
    "turn ({where}): each answer of such a conversation is a row of its own",
    "message_fields_ignored": 'fields of messages ignored: {names} ({where}); `"weight": 0` alone leaves a '
    "message out of what is learned",
    "tool_fields_ignored": "fields of tools ignored, as serving ignores them: {names} ({where})",
    "role_not_rendered": "the chat template does not render messages of role {names} ({where})",
    "field_not_rendered": "the chat template does not render {names} ({where})",
    "opens_thinking": "the chat template opens <think> in each prompt, and answers without reasoning_content "
    "({where}) teach the model not to think",
    "nulls_left_out": "fields of tools and tool calls that are null were left out ({where}): a column of objects has "
    "each field of any of its rows",
    "date": "the chat template writes today's date into prompts: rows keep the date on which they were tokenized "
    "(--default-chat-template-kwargs can fix it where the template takes one)",
    "control_tokens": "answers hold control tokens, which are learned as such: {names} ({where})",
    "end_is_no_stop": "what ends an answer here, {names}, does not end one in serving, whose answers will run on: "
    "add it to eos_token_id in the model's generation_config.json, or ask with stop_token_ids",
}

"""One row of data as token ids and the mask of what is learned.

The ids before an answer are exactly those that serving computes for the same prompt
(``/v1/chat/completions`` encodes the template rendered with its generation prompt,
``/v1/completions`` encodes the prompt), and the answer's follow.  The end-of-turn token is learned,
what a template writes behind it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_harli.protocol.rows import forms
from sglang_harli.protocol.tokenizer_state import ChatTemplate
from sglang_harli.service.rows import content_format
from sglang_harli.service.rows.conversation import Conversation
from sglang_harli.service.rows.error import RowError, kind
from sglang_harli.service.rows.forms import alpaca, sharegpt
from sglang_harli.service.rows.row import Reading, Row, end_of_text
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer, describe

# How the forms that are no conversations of messages are read.
READ_AS = {forms.ALPACA: alpaca.READ_AS, forms.SHAREGPT: sharegpt.READ_AS}


class RowEncoder:
    """Makes token ids and a loss mask of a row, with a served or a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer, ServedTokenizer):
            tokenizer = of_transformers(tokenizer)
        self.served: ServedTokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """Differs where ids or the chat template would."""
        return self.served.fingerprint

    def rows(self, record: Any, reading: Reading | None = None) -> list[Row]:
        """The training rows of one line's JSON value, almost always one; raises RowError.

        A template that renders earlier answers differently as a conversation goes on (Qwen3 drops
        their reasoning) gives one row per answer, so that each prompt is what serving saw.
        """
        return list(self.each_row(record, reading or Reading()))

    def each_row(self, record: Any, reading: Reading) -> Iterator[Row]:
        """The rows one after the other: together they may be far longer than the line."""
        if self.served.refusal is not None:
            raise RowError(self.served.refusal)
        if not isinstance(record, dict):
            raise RowError(f"a JSON object is expected, this is {kind(record)}")
        form = forms.form_of(record) or reading.form
        if form == forms.MESSAGES and record.get("messages") is not None:
            if any(record.get(name) is not None for name in ("prompt", "completion")):
                raise RowError(
                    "it has both 'messages' and 'prompt'/'completion': give one of the two forms", "messages"
                )
            yield from Conversation(self.served, record, reading).rows()
        elif form == forms.PAIR:
            yield self._completion(record, reading)
        elif form == forms.ALPACA:
            yield from self._converted({"messages": alpaca.messages(record)}, reading, "instruction")
        elif form == forms.SHAREGPT:
            yield from self._sharegpt(record, reading)
        elif "messages" in record:
            raise RowError("field 'messages' is null", "messages")
        else:
            found = ", ".join(repr(k) for k in list(record)[:5]) or "nothing"
            raise RowError(
                f"field 'messages' (or 'prompt' and 'completion') is missing; found {found}", "messages"
            )

    # ---- other tools' forms, as messages
    def _sharegpt(self, record: dict[str, Any], reading: Reading) -> Iterator[Row]:
        made = {"messages": sharegpt.messages(record), "tools": sharegpt.tools(record.get("tools"))}
        yield from self._converted(made, reading, "conversations")
        unknown = sharegpt.unknown_fields(record["conversations"])
        reading.notes.add("message_fields_ignored", sorted(unknown))

    def _converted(self, made: dict[str, Any], reading: Reading, field: str) -> Iterator[Row]:
        """``field``: what the row has in the place of messages."""
        try:
            yield from Conversation(self.served, made, reading).rows()
        except RowError as error:
            if error.field != "messages":
                raise
            roles = [str(message["role"]) for message in made["messages"]]
            shown = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
            raise RowError(f"{error.reason} (it is read as the messages {shown})", field) from error

    # ---- prompt and completion
    def _completion(self, record: dict[str, Any], reading: Reading) -> Row:
        for name in ("prompt", "completion"):
            if record.get(name) is None:
                raise RowError(f"field '{name}' is {'null' if name in record else 'missing'}", name)
            if not isinstance(record[name], str):
                raise RowError(f"field '{name}' must be a string, it is {kind(record[name])}", name)
        if not record["completion"]:
            raise RowError("field 'completion' is empty: there is nothing to learn", "completion")
        served, text = self.served, record["prompt"]
        prompt = served.encode(text)
        whole = served.encode(text + record["completion"])
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        else:
            answer = served.encoder.encode(record["completion"], special=False)
        if answer[-1:] != [served.eos_id]:
            answer = [*answer, end_of_text(served)]
        tokens = {*answer[:-1]} & served.special_ids
        reading.notes.add("control_tokens", sorted(served.decode([i]) for i in tokens))
        return Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def of_transformers(tokenizer: Any) -> ServedTokenizer:
    """A transformers tokenizer with its own chat template, as a server without flags uses it."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = next(iter(source.values()), None)
    found = content_format.detect(source) if source else content_format.STRING
    chat = ChatTemplate(source=source or None, content_format=found)
    return ServedTokenizer(describe(tokenizer, chat, []), tokenizer)


def unused_fields(record: dict[str, Any], form: str | None) -> set[str]:
    """Keys of an accepted row of this form that are passed over; one that is null counts not."""
    used = forms.FIELDS.get(form or "", forms.USED)
    return {key for key, value in record.items() if key not in used and value is not None}

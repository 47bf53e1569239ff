"""Rows in the forms of other tools, known by their fields, and the accepted form of each."""

from __future__ import annotations

from typing import Any

from sglang_harli.protocol.odd_values import USED
from sglang_harli.service.rows.encoder import RowError

_CHAT = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
_PAIR = '{"prompt": ..., "completion": ...}'
# (fields that are all there, what the row is, what to write)
_FORMS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("chosen", "rejected"), "a preference pair", f"it holds no single answer to learn: write {_PAIR}"),
    (("instruction", "output"), "a row in Alpaca's form", f"join instruction and input: write {_PAIR}"),
    (("custom_id", "body"), "a request of a batch file", f"take the messages out of 'body': write {_CHAT}"),
    (("contents",), "a row in Gemini's form", f"write {_CHAT}"),
    (("input_ids",), "a row of token ids", f"rows are tokenized here: write {_CHAT} or {_PAIR}"),
    (("question", "answer"), "a question and its answer", f"write {_PAIR}"),
    (("input", "output"), "an input and its output", f"write {_PAIR}"),
    (("query", "response"), "a query and its response", f"write {_PAIR}"),
    (("role", "content"), "a single message", f"a row is a conversation: write {_CHAT}"),
    (("text",), "a text", 'write {"prompt": "", "completion": ...} to learn all of it'),
)


def check(record: Any) -> None:
    """Raise RowError for a row without an accepted field that has another tool's form."""
    if isinstance(record, list) and record and all(isinstance(part, dict) for part in record):
        if all("role" in part for part in record):
            raise RowError(
                f"a JSON object is expected, this is a list of messages: write {_CHAT}", "messages"
            )
        return
    if not isinstance(record, dict) or any(record.get(name) is not None for name in USED):
        return
    for name in record:
        if name not in USED and name.strip().lower() in USED:
            raise RowError(f"field {name!r} must be written {name.strip().lower()!r}", name.strip().lower())
    for name in ("conversations", "conversation", "dialogue", "dialog"):
        if isinstance(record.get(name), list):
            raise RowError(_conversation(name, record[name]), "messages")
    for fields, what, mend in _FORMS:
        if all(name in record for name in fields):
            found = ", ".join(repr(name) for name in list(record)[:5])
            raise RowError(
                f"field 'messages' (or 'prompt' and 'completion') is missing; found {found}, which is {what}: {mend}",
                "messages",
            )


def _conversation(name: str, turns: list[Any]) -> str:
    first = turns[0] if turns else None
    if isinstance(first, dict) and "from" in first and "value" in first:
        return (
            f"this is a row in ShareGPT's form ({name!r} with 'from' and 'value'): write {_CHAT}, "
            "with the roles system, user (human), assistant (gpt) and tool"
        )
    return f"the messages stand in field {name!r}: write {_CHAT}"

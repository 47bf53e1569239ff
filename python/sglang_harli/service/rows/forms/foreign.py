"""Rows in forms that are not read, known by their fields, and what to write in place of each."""

from __future__ import annotations

from typing import Any

from sglang_harli.protocol.rows.forms import form_of
from sglang_harli.service.rows.error import RowError

_CHAT = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
_PAIR = '{"prompt": ..., "completion": ...}'
# (fields that are all there, what the row is, what to write)
_FORMS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("instruction", "response"),
        "a row in Dolly's form",
        "rename 'response' to 'output' and 'context' to 'input'",
    ),
    (("custom_id", "body"), "a request of a batch file", f"take the messages out of 'body': write {_CHAT}"),
    (("contents",), "a row in Gemini's form", f"write {_CHAT}"),
    (("input_ids",), "a row of token ids", f"rows are tokenized here: write {_CHAT} or {_PAIR}"),
    (("question", "answer"), "a question and its answer", f"write {_PAIR}"),
    (("input", "output"), "an input and its output", f"write {_PAIR}"),
    (("query", "response"), "a query and its response", f"write {_PAIR}"),
    (("role", "content"), "a single message", f"a row is a conversation: write {_CHAT}"),
    (("text",), "a text", 'write {"prompt": "", "completion": ...} to learn all of it'),
)


_NAMES = ("messages", "tools", "prompt", "completion", "instruction", "conversations")
# Fields of pairs of a better and a worse answer (DPO and the like), as several tools name them.
_PREFERENCES = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "rejected"),
    ("answer_chosen", "answer_rejected"),
)


def check(record: Any) -> None:
    """Raise RowError for a row that has another tool's form, and no accepted one."""
    if isinstance(record, list) and record and all(isinstance(part, dict) for part in record):
        if all("role" in part for part in record):
            raise RowError(
                f"a JSON object is expected, this is a list of messages: write {_CHAT}", "messages"
            )
        return
    if not isinstance(record, dict):
        return
    for fields in _PREFERENCES:
        if all(name in record for name in fields) and not _has_answer(record):
            raise RowError(
                f"this looks like preference data (DPO): {fields[0]!r} and {fields[1]!r} are two answers to compare, "
                f"and finetuning here learns single answers: write the better one as {_PAIR}",
                fields[0],
            )
    if form_of(record) is not None:
        return
    for name in record:
        if name not in _NAMES and name.strip().lower() in _NAMES:
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


def _has_answer(record: dict[str, Any]) -> bool:
    """Whether there is one answer to learn, whatever stands beside it."""
    return any(record.get(name) is not None for name in ("messages", "completion", "output"))


def _conversation(name: str, turns: list[Any]) -> str:
    first = turns[0] if turns else None
    if isinstance(first, dict) and "from" in first and "value" in first:
        return f"the turns stand in field {name!r}: rename it to 'conversations'"
    return f"the messages stand in field {name!r}: write {_CHAT}"

"""The forms that a row of training data may have, and which one a row has: seen from its fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

MESSAGES, PAIR, ALPACA, SHAREGPT = "messages", "prompt_completion", "alpaca", "sharegpt"
# The fields of each form that are read; others are ignored, and named.
FIELDS: dict[str, tuple[str, ...]] = {
    MESSAGES: ("messages", "tools"),
    PAIR: ("prompt", "completion"),
    ALPACA: ("instruction", "input", "output", "system", "history"),
    SHAREGPT: ("conversations", "system", "tools"),
}
USED = FIELDS[MESSAGES] + FIELDS[PAIR]
ALL = tuple(dict.fromkeys(field for fields in FIELDS.values() for field in fields))
LISTS = ("messages", "tools", "conversations", "history")  # a table's cells hold them as JSON
ACCEPTED = (
    "'messages'; 'prompt' and 'completion'; 'instruction', 'input' and 'output' (Alpaca); or "
    "'conversations' (ShareGPT)"
)


def form_of(record: Any) -> str | None:
    """A row's form; None: it has none of them (a field that is null is as one that is not there).

    A row with fields of two forms has the first one: ``messages`` beside a prompt is refused where
    the row is read.
    """
    if not isinstance(record, Mapping):
        return None
    if record.get("messages") is not None:
        return MESSAGES
    if record.get("prompt") is not None or record.get("completion") is not None:
        return PAIR
    if _has_turns(record.get("conversations")):
        return SHAREGPT
    given = [record.get(name) is not None for name in ("instruction", "output")]
    return ALPACA if any(given) and "instruction" in record and "output" in record else None


def form_of_columns(columns: Collection[str]) -> str | None:
    """The form of a table's rows, by the names of its columns."""
    names = dict.fromkeys(columns, "") | ({"conversations": []} if "conversations" in columns else {})
    return form_of(names)


def fields_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a row that are read."""
    return FIELDS.get(form_of(record) or "", USED)


def _has_turns(turns: Any) -> bool:
    """Whether they are ShareGPT's: with ``from`` and ``value``, not with ``role``."""
    if not isinstance(turns, list):
        return False
    return not turns or not (isinstance(turns[0], Mapping) and "role" in turns[0] and "from" not in turns[0])

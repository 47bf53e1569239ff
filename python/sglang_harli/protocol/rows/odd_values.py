"""Values in used fields that JSON lacks: NaN, infinities, half of a surrogate pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sglang_harli.protocol.rows import forms

MAX_DEPTH = 100  # levels of objects and lists in a field that is used

Path = tuple[str | int, ...]


def fields_of(record: Any, *, whole: bool = False) -> Iterator[tuple[Path, Any]]:
    """Every value in the used fields of a row, with its path; ``whole``: also the row itself."""
    if not isinstance(record, dict):
        return
    if whole:
        yield (), record
    used = ((name, record[name]) for name in forms.fields_of(record) if name in record)
    left: list[tuple[Path, Iterator[tuple[str | int, Any]]]] = [
        ((), used)
    ]  # of each level what is still to come
    while left:
        path, parts = left[-1]
        for name, value in parts:
            here = (*path, name)
            yield here, value
            if isinstance(value, dict | list | tuple) and len(here) <= MAX_DEPTH:
                left.append((here, iter(value.items() if isinstance(value, dict) else enumerate(value))))
                break
        else:
            left.pop()


def odd_value(record: Any) -> tuple[Path, str] | None:
    """The first value that cannot be used, and what it is; None where all can."""
    for path, value in fields_of(record):
        if isinstance(value, float) and not math.isfinite(value):
            return path, f"is {'NaN' if math.isnan(value) else 'Infinity'}, which JSON has not"
        if isinstance(value, str) and (half := _half(value)) is not None:
            return path, half
        if isinstance(value, dict):
            named = next((half for name in value if isinstance(name, str) and (half := _half(name))), None)
            if named is not None:
                return path, f"has a field whose name {named}"
        if len(path) > MAX_DEPTH:
            return path[:3], f"is nested too deep: at most {MAX_DEPTH} levels are accepted"
    return None


def _half(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}, character {error.start + 1}"
        return f"holds half of a surrogate pair ({half}): write both halves or none"
    return None


def place(path: Path) -> str:
    """``field 'prompt'``, ``message 2: field 'content'``, ``field 'tools[0].function'``."""
    part = {"messages": "message", "conversations": "turn"}.get(str(path[0]) if path else "")
    if part and len(path) > 1 and isinstance(path[1], int):
        rest = _dotted(path[2:])
        return f"{part} {path[1] + 1}" + (f": field '{rest}'" if rest else "")
    return f"field '{_dotted(path)}'" if path else "the row"


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text

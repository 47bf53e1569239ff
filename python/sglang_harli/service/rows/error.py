"""Why a line of data is not accepted."""

from __future__ import annotations

from typing import Any


class RowError(ValueError):
    """A line that is not accepted; the text is the reason, ``field`` what it is about."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class FileFault(ValueError):
    """A file that is not accepted as a whole, or cannot be read on; the text says why and what to
    do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

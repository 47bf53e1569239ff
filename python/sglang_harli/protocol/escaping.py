"""Foreign text (data, names, servers) as it can be shown: no character of it steers a terminal."""

from __future__ import annotations

import json
import math
import re
from typing import Any

# Control characters (ESC too), line separators, marks and overrides of the writing direction, and
# halves of surrogate pairs.
_STEERING = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"  # fmt: skip
_ALL = re.compile(f"[{_STEERING}]")
_BUT_LINE_ENDS = re.compile(f"(?!\n)[{_STEERING}]")
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}


def escaped(text: str, *, lines: bool = False) -> str:
    r"""``text`` with such characters as ``\x1b``, ``\u202e``; ``lines``: newlines may stay."""
    return (_BUT_LINE_ENDS if lines else _ALL).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    number = ord(character)
    return _SHORT.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def json_text(value: Any, *, encoding: str = "utf-8", indent: int | None = None) -> str:
    """Plain values as JSON in ``encoding`` that steers no terminal; NaN becomes null."""
    separators = (",", ": ") if indent else (",", ":")
    plain = _finite(value)
    text = json.dumps(plain, ensure_ascii=False, indent=indent, separators=separators)
    # Within JSON they stand in texts only, where they may be escaped.
    text = _BUT_LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return json.dumps(plain, indent=indent, separators=separators).replace("\x7f", r"\u007f")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value

"""One row of a training file as its JSON value, or in words, with the column, why it is no JSON.

More than JSON is read where it does no harm, in fields that are not used: NaN, Infinity, numbers of
any size.  A field that stands twice is reported.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from sglang_harli.protocol.rows import forms
from sglang_harli.protocol.rows.odd_values import MAX_DEPTH, fields_of, odd_value, place
from sglang_harli.service.data.files.lines import MAX_LINE_BYTES, Coding, Line
from sglang_harli.service.rows.error import RowError

# What may hold a value that JSON does not have; looked for before a row is searched for one.
_ODD = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]|[0-9][eE]\+?[0-9]{3}|[0-9]{300}")
_WORDS = {
    **dict.fromkeys(("None", "True", "False"), "is Python's: JSON writes null, true and false"),
    **dict.fromkeys(("undefined", "TRUE", "FALSE", "NULL", "nan", "inf", "nil"), "is no JSON value"),
}


MAX_DOUBLED = 1000  # objects of a line that have a field twice


class RowReader:
    """Reads the rows of a file; ``twice``: fields that stand twice in the last one's objects."""

    def __init__(self, coding: Coding) -> None:
        self._coding = coding
        self._doubled: dict[int, tuple[dict[str, Any], list[str]]] = {}  # by the object's id
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.twice: list[str] = []

    def read(self, line: Line) -> Any:
        """The line's value; raises RowError."""
        if line.text is None:
            raise too_long("the line" if line.first is None else "the row")
        self._doubled.clear()
        text = self._decode(line)
        value = self._value(text, lambda at: _place(line, text, at), line.first is None)
        if _ODD.search(line.text) or line.text.count(b"[") + line.text.count(b"{") > MAX_DEPTH:
            check_values(value)
        self.twice = list(self._find_doubled(value)) if self._doubled else []
        return value

    def cell(self, text: str, column: str) -> Any:
        """The JSON value in a table's cell; raises RowError.  ``twice`` is left as it is."""
        self._doubled.clear()
        try:
            lead = len(text) - len(text.lstrip())
            return self._value(text[lead:], lambda at: f"at character {lead + at + 1}")
        except RowError as error:
            mend = ""
            if re.match(r"\s*\[\s*\{\s*'", text):
                mend = ": it is written as Python prints it, write json.dumps(...) of it into the table"
            raise RowError(f"column '{column}': {error.reason}{mend}", column) from error

    def _value(self, text: str, shown: Callable[[int], str], lines: bool = False) -> Any:
        """``shown``: a place in the text, in words; ``lines``: each row is a line."""
        try:
            value, end = self._decoder.raw_decode(text)
            if end < len(text) and text[end:].strip():
                raise json.JSONDecodeError("Extra data", text, len(text) - len(text[end:].lstrip()))
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {_why(error, lines)} {shown(error.pos)}") from error
        except RecursionError as error:
            raise RowError(f"nested too deep: at most {MAX_DEPTH} levels are accepted") from error
        except ValueError as error:  # Python reads no integer of more than 4,300 digits
            raise RowError("it holds a number of thousands of digits") from error
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            names = [name for name, _ in pairs if name in seen or seen.add(name)]
            if len(self._doubled) < MAX_DOUBLED:
                self._doubled[id(made)] = made, sorted(set(names))
        return made

    def _find_doubled(self, value: Any) -> list[str]:
        found = []
        for path, part in fields_of(value, whole=True):
            _, names = self._doubled.get(id(part), (None, ()))
            found += [place((*path, name)) for name in names if path or name in forms.fields_of(value)]
        return found

    def _decode(self, line: Line) -> str:
        raw = line.text or b""
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode()
            where = _place(line, before, len(before))
            if self._coding.name != "utf-8":
                raise RowError(
                    f"not {self._coding.shown}: a broken character {where}: save the file as UTF-8"
                ) from error
            raise not_utf8(raw[error.start], where) from error


def check_values(row: Any) -> None:
    """Raise RowError for a value that JSON has not, or one that is nested too deep, in a field that
    is used."""
    found = odd_value(row)
    if found is not None:
        path, problem = found
        raise RowError(f"{place(path)} {problem}", str(path[0]) if path else None)


def too_long(what: str) -> RowError:
    return RowError(f"{what} is longer than {MAX_LINE_BYTES >> 20} MiB")


def not_utf8(byte: int, where: str) -> RowError:
    """``where``: the byte's place, in words."""
    meant = bytes([byte]).decode("cp1252", "ignore")
    hint = f" ({meant} in Latin-1 or Windows-1252)" if meant.isprintable() and meant else ""
    return RowError(f"not UTF-8: byte {byte:#04x}{hint} {where}: save the file as UTF-8")


def _place(line: Line, text: str, at: int) -> str:
    """Of a character of the line's text: its column; in a row of several lines its line too."""
    if line.first is None:
        return f"at column {line.lead + at + 1}"
    begin = text.rfind("\n", 0, at) + 1
    lead = 0 if begin else line.lead
    return f"at line {line.first + text.count(chr(10), 0, at)}, column {lead + at - begin + 1}"


# ------------------------------------------------------------------ why a text is no JSON
def _why(error: json.JSONDecodeError, lines: bool) -> str:
    text, at = error.doc, error.pos
    rest = text[at:]
    if not rest:
        return "the line ends in the middle of the value"
    if error.msg.startswith("Invalid control character"):
        return f"{_character(rest[0])} stands as such in a text, write {json.dumps(rest[0])[1:-1]}"
    if error.msg.startswith("Unterminated string"):
        return "the line ends in the middle of the text that begins"
    if error.msg.startswith("Invalid \\"):
        return "a backslash that begins no JSON escape (a backslash itself is written \\\\)"
    if error.msg == "Extra data":
        return _why_extra(rest, lines)
    word = re.match(r"[A-Za-z_][A-Za-z0-9_]*", rest)
    if "property name" in error.msg:
        return _why_no_name(text, at, word[0] if word else "")
    if word and word[0] in _WORDS:
        return f"{word[0]} {_WORDS[word[0]]}"
    if rest[0] in "'\u201c\u201d\u2018\u2019`":
        return f"{_character(rest[0])} in place of a double quote"
    if error.msg == "Expecting value" and rest[0] in "]}" and text[:at].rstrip().endswith(","):
        return f"a comma before {rest[0]}"
    if error.msg.startswith("Expecting ','"):
        hint = ' (a quote within a text is written \\")' if text[:at].rstrip().endswith('"') else ""
        return f"{_character(rest[0])} where a comma or a closing bracket is expected{hint}"
    expected = "a colon" if error.msg.startswith("Expecting ':'") else "a JSON value"
    return f"{_character(rest[0])} where {expected} is expected"


def _why_extra(rest: str, lines: bool) -> str:
    if rest.strip() == ",":
        return "a comma behind the row"
    if rest.startswith(("{", "[", '"')):
        return (
            "a second value on the line (one row per line)"
            if lines
            else "a second value (a comma is missing before it)"
        )
    if rest.startswith(("//", "/*", "#")):
        return "a comment, which JSON has not"
    return f"{_character(rest[0])} behind the value"


def _why_no_name(text: str, at: int, word: str) -> str:
    if word:
        return f"the field name {word} without double quotes"
    if text[at] == "}" and text[:at].rstrip().endswith(","):
        return "a comma before }"
    if text[at] in "'\u201c\u201d\u2018\u2019`":
        return f"{_character(text[at])} in place of a double quote"
    return f"{_character(text[at])} where a field name in double quotes is expected"


def _character(found: str) -> str:
    """``'x'``; one that is not seen, or easily mistaken, by its number and name."""
    if found.isascii() and found.isprintable():
        return f'"{found}"' if found == "'" else f"'{found}'"
    name = unicodedata.name(found, "").lower() or ("NUL" if found == "\0" else "a control character")
    return f"U+{ord(found):04X} ({name})"

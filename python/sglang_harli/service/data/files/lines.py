"""The lines of a training file as UTF-8 bytes, whichever Unicode encoding and line ends it has.

The file is streamed: a line of any length takes bounded memory.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from sglang_harli.service.data.files.packed import Opener

MAX_LINE_BYTES = 16 << 20
HEAD_BYTES = 1 << 20  # read ahead, to see what the file is
_PIECE = 1 << 16
_MARK = b"\xef\xbb\xbf"  # the byte order mark in UTF-8
# RFC 7464 begins each row with the byte 1E.
_LEAD = re.compile(rb"(?:[ \t\n\r\x0b\x0c\x1e]|\xef\xbb\xbf)*")
_TRAIL = b" \t\n\r\x0b\x0c\x1e"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")


@dataclass(frozen=True, slots=True)
class Coding:
    """A file's encoding, by Python's name; ``lone_cr``: CR alone ends a line (classic Mac OS)."""

    name: str = "utf-8"
    lone_cr: bool = False

    @property
    def shown(self) -> str:
        return self.name.upper().removesuffix("-LE").removesuffix("-BE")


UTF8 = Coding()


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank, or one row of a JSON array."""

    number: int  # from 1, of the line or the row
    text: bytes | None  # UTF-8, without marks and white space around it; None: it is too long
    lead: int = 0  # characters before the text
    first: int | None = None  # of a row that is no line: the line on which it begins


def coding_of(head: bytes) -> Coding:
    """By the byte order mark, or by the zero bytes of the first characters (ASCII in JSON)."""
    name = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if name is None:
        name = next((name for name in _WIDE if _is_json(head[:64], name)), "utf-8")
    text = decode(head, name)
    return Coding(name, "\r" in text and "\n" not in text)


def decode(head: bytes, name: str) -> str:
    """The beginning of a file, which may end within a character."""
    return codecs.getincrementaldecoder(name)("replace").decode(head)


def _is_json(head: bytes, name: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return False
    return text.lstrip("\ufeff \t\r\n").startswith(("{", "[")) and "\0" not in text


def read_head(opener: Opener) -> bytes:
    with opener() as file:
        return file.read(HEAD_BYTES)


def read_lines(opener: Opener, coding: Coding) -> Iterator[Line]:
    """The lines that are not blank."""
    with opener() as raw, utf8(raw, coding) as file:
        number = 0
        while raw_line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw_line) > MAX_LINE_BYTES:
                while raw_line and not raw_line.endswith(b"\n"):
                    raw_line = file.readline(MAX_LINE_BYTES)
                yield Line(number, None)
                continue
            start = _LEAD.match(raw_line).end()  # type: ignore[union-attr]  (it matches the empty text)
            text = raw_line[start:].rstrip(_TRAIL)
            if text:
                yield Line(number, text, len(raw_line[:start].replace(_MARK, b"")))


def utf8(file: BinaryIO, coding: Coding) -> io.BufferedIOBase | BinaryIO:
    """A file's bytes as UTF-8, with line feeds alone at the ends of its lines."""
    if coding == UTF8:
        return file
    return io.BufferedReader(_Recoded(file, coding), _PIECE)


class _Recoded(io.RawIOBase):
    """A file's bytes as UTF-8 with line feeds at the ends of lines.

    What is broken stays broken, so that its line is refused: bytes that are no UTF-8 come through
    as they are, halves of surrogate pairs in a form that UTF-8 does not allow.
    """

    def __init__(self, file: BinaryIO, coding: Coding) -> None:
        self._file = file
        self._name = coding.name
        self._errors = "surrogateescape" if coding.name == "utf-8" else "surrogatepass"
        self._decoder: Any = codecs.getincrementaldecoder(coding.name)(self._errors)
        self._ends: Any = io.IncrementalNewlineDecoder(None, translate=True) if coding.lone_cr else None
        self._left = b""
        self._done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._done:
            self._left = self._next()
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _next(self) -> bytes:
        piece = self._file.read(_PIECE)
        self._done = not piece
        try:
            text = self._decoder.decode(piece, self._done)
        except UnicodeDecodeError as error:  # no character of this encoding, or the file ends within one
            self._done = True
            text = error.object[: error.start].decode(self._name, self._errors) + "\udcff"
        if self._ends is not None:
            text = self._ends.decode(text, self._done)
        return text.encode("utf-8", self._errors)

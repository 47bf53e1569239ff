"""The elements of a JSON array, found one after the other without holding the array."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from sglang_harli.service.data.files import lines
from sglang_harli.service.data.files.lines import Line
from sglang_harli.service.rows.error import FileFault

_PIECE = 1 << 20
_BLANK = b" \t\n\r\x0b\x0c\x1e"
# A whole text, or a sign that counts outside of texts.
_SIGN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_REST_OF_TEXT = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def elements(file: BinaryIO | io.BufferedIOBase) -> Iterator[Line]:
    """The array's elements, numbered from 1, as they stand in the file (UTF-8).

    Raises FileFault: the array is not closed, or something stands behind it.
    """
    return _Scan(file).elements()


class _Scan:
    """One pass over the file; each piece of it is looked at once."""

    def __init__(self, file: BinaryIO | io.BufferedIOBase) -> None:
        self._file = file
        self._piece = b""
        self._at = 0  # in the piece: what is before it was looked at
        self._start = 0  # in the piece: where the element begins, or goes on
        self._depth = 0
        self._in_text = False
        self._before: list[bytes] = []  # of the element, from the pieces before
        self._size = 0  # of that; counted on where it is too long and no more kept
        self._line = 1  # of the element's beginning, as far as it is known
        self._number = 0

    def elements(self) -> Iterator[Line]:
        while self._read():
            while (sign := self._next_sign()) is not None:
                if sign in b"[{":
                    self._depth += 1
                    if self._depth == 1:
                        self._open()
                elif sign in b"]}" and self._depth > 1:
                    self._depth -= 1
                elif self._depth == 1 and sign in b",]":
                    yield from self._end(last=sign == b"]")
                    if sign == b"]":
                        self._check_end()
                        return
                    self._start = self._at
            self._keep()
        self._number += 1
        raise FileFault(
            f"the file ends within row {self._number} of its JSON array: it was cut off, or a quote or a bracket of "
            f"that row (it begins at line {self._line}) is never closed"
        )

    def _read(self) -> bool:
        left = self._piece[self._at :]  # half of an escape
        more = self._file.read(_PIECE)
        self._piece, self._at, self._start = left + more, 0, 0
        return bool(more)

    def _next_sign(self) -> bytes | None:
        """The next sign outside of texts; None: the piece has no more."""
        while True:
            if self._in_text:
                found = _REST_OF_TEXT.match(self._piece, self._at)
                self._at = found.end()  # type: ignore[union-attr]  (it matches the empty text)
                if self._piece[self._at : self._at + 1] != b'"':
                    return None
                self._at += 1
                self._in_text = False
            found = _SIGN.search(self._piece, self._at)
            if found is None:
                self._at = len(self._piece)
                return None
            self._at = found.end()
            if found[0] == b'"':
                self._in_text = True
            elif found[0][:1] != b'"':
                return found[0]

    # ---- the element
    def _open(self) -> None:
        """Behind the array's bracket; what stood before it is blank."""
        self._line += self._piece.count(b"\n", self._start, self._at)
        self._line += sum(kept.count(b"\n") for kept in self._before)
        self._before, self._size, self._start = [], 0, self._at

    def _keep(self) -> None:
        """What the piece has of the element, before the next one is read."""
        part = self._piece[self._start : self._at]
        self._size += len(part)
        if self._size <= lines.MAX_LINE_BYTES:
            self._before.append(part)
        else:
            self._line += sum(kept.count(b"\n") for kept in self._before) + part.count(b"\n")
            self._before = []

    def _end(self, *, last: bool) -> Iterator[Line]:
        """The element before the sign that was met."""
        part = self._piece[self._start : self._at - 1]
        size, before = self._size + len(part), self._before
        self._size, self._before = 0, []
        if size > lines.MAX_LINE_BYTES:
            self._line += sum(kept.count(b"\n") for kept in before) + part.count(b"\n")
            self._number += 1
            yield Line(self._number, None, first=self._line)
            return
        raw = b"".join([*before, part])
        text = raw.strip(_BLANK)
        if last and not text and not self._number:
            return
        self._number += 1
        lead = raw[: len(raw) - len(raw.lstrip(_BLANK))]
        self._line += lead.count(b"\n")
        if not text:
            raise FileFault(
                f"row {self._number} of its JSON array is missing: nothing stands "
                f"{'between the last comma and the closing bracket' if last else 'before the comma'} "
                f"at line {self._line}: take the comma out"
            )
        behind_break = len(lead) - lead.rfind(b"\n") - 1
        yield Line(self._number, text, behind_break, self._line)
        self._line += raw[len(lead) :].count(b"\n")

    def _check_end(self) -> None:
        rest = self._piece[self._at :]
        while True:
            if rest.strip(_BLANK):
                raise FileFault(
                    f"more stands behind the JSON array, which ends at line {self._line}: put all rows into one array"
                )
            rest = self._file.read(_PIECE)
            if not rest:
                return

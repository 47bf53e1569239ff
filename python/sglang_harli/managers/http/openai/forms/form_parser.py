"""A multipart/form-data body, part by part: one file, whose bytes are passed on as they come, and
short fields before or behind it.  Pure; memory holds the fields, never the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sglang_harli.errors import SHOWN, ConfigError, HarliError, shown
from sglang_harli.managers.http.openai.errors import Refusal

MAX_FIELD_BYTES = 4096
MAX_HEADERS, MAX_HEADER_BYTES = 8, 4096  # of one part
MAX_FILENAME = 255
UNNAMED = "upload"  # as the openai client calls a file without a name
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]\Z")
_PLAIN = (b"binary", b"8bit", b"7bit")


@dataclass(frozen=True, slots=True)
class FileBegins:
    """The file's part begins; ``filename`` is for display."""

    filename: str


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The next bytes of the file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Field:
    """A whole field."""

    name: str
    value: str


Event = FileBegins | FileBytes | Field


class FormParser:
    """Takes a body in any pieces and says what has come.

    Args:
        content_type: the request's header.
        file: the name of the part that is the file.
        fields: the names of the other parts.

    ``feed`` and ``finish`` raise HarliError naming the part at fault; ``Refusal`` 400: the body is
    no such form.
    """

    def __init__(self, content_type: str, file: str, fields: Collection[str]) -> None:
        self._file, self._fields = file, fields
        self._parser = MultipartParser(
            boundary_of(content_type),
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._ends,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )
        self._events: list[Event] = []
        self._seen: set[str] = set()
        self._name = ""  # of the part that comes
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._ended = False

    def feed(self, data: bytes) -> list[Event]:
        """The events of the next bytes, in their order."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Refusal(f"the body is not multipart/form-data: {error}", code="invalid_form") from error
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """The body is over: it has to be a whole form with its file."""
        if not self._ended:
            text = "the form ends before its last boundary: it was cut off, or its boundary is another one"
            raise Refusal(text, code="invalid_form")
        if self._file not in self._seen:
            text = f"{self._file} is missing: send it as a part of the form"
            raise ConfigError(text, param=self._file, code="missing_required_parameter")

    # ---------------------------------------------------------------- of python-multipart
    def _part_begins(self) -> None:
        self._headers = {}
        self._header = bytearray(), bytearray()
        self._value = bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_ends(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        self._header = bytearray(), bytearray()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise Refusal(
                "a part of the form has no Content-Disposition: form-data; name=...", code="invalid_form"
            )
        name = self._name = options[b"name"].decode(errors="replace")
        if name != self._file and name not in self._fields:
            known = ", ".join([self._file, *self._fields])
            raise ConfigError(
                f"unknown field {shown(name)}; accepted: {known}",
                param=name[:SHOWN],
                code="unknown_parameter",
            )
        if name in self._seen:
            raise ConfigError(f"{name} is given more than once", param=name)
        if self._headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in _PLAIN:
            raise ConfigError(
                f"{name} has a Content-Transfer-Encoding: send its bytes as they are", param=name
            )
        self._seen.add(name)
        if name == self._file:
            self._events.append(
                FileBegins(display_name(options.get(b"filename", b"").decode(errors="replace")))
            )

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file:
            self._events.append(FileBytes(data[start:end]))
            return
        if len(self._value) + end - start > MAX_FIELD_BYTES:
            raise _bad_field(self._name, f"it has more than {MAX_FIELD_BYTES:,} bytes")
        self._value += data[start:end]

    def _part_ends(self) -> None:
        if self._name == self._file:
            return
        try:
            text = self._value.decode()
        except UnicodeDecodeError as error:
            raise _bad_field(self._name, "it is not in UTF-8") from error
        if "\0" in text:
            raise _bad_field(self._name, "it holds a NUL character")
        self._events.append(Field(self._name, text))

    def _ends(self) -> None:
        self._ended = True


def _bad_field(name: str, why: str) -> HarliError:
    return ConfigError(f"{name} is not accepted: {why}", param=name)


def boundary_of(content_type: str) -> bytes:
    """The boundary that a request's Content-Type names; Refusal 400: it is of another type."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        given = shown(content_type) if content_type else "missing"
        raise Refusal(f"the Content-Type is {given}: send multipart/form-data", code="invalid_content_type")
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.match(boundary):
        text = "the Content-Type names no boundary of 1 to 70 accepted characters (RFC 2046)"
        raise Refusal(text, code="invalid_content_type")
    return boundary


def display_name(given: str) -> str:
    """A file's name without its folders and without what cannot be printed.  It is shown and given
    back; no path is ever made of it."""
    last = re.split(r"[/\\]", given)[-1]
    return "".join(char for char in last if char.isprintable()).strip()[:MAX_FILENAME] or UNNAMED

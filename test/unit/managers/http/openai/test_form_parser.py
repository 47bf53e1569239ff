"""Multipart forms: any cut of a body gives the same, and what is no such form is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_harli.errors import HarliError
from sglang_harli.managers.http.openai.forms.form_parser import (
    MAX_FIELD_BYTES,
    Field,
    FileBegins,
    FileBytes,
    FormParser,
    display_name,
)

BOUNDARY = "x-B0undary"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: bytes, filename: str | None = None, *more: str) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    return "\r\n".join([f"--{BOUNDARY}", disposition, *more, "", ""]).encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


PURPOSE = part("purpose", b"fine-tune")
WHOLE = form(PURPOSE, part("file", b"data", "a.jsonl"))


def parsed(pieces: Iterable[bytes], content_type: str = TYPE) -> tuple[dict[str, str], str | None, bytes]:
    """(fields, filename, the file's bytes)."""
    parser = FormParser(content_type, "file", {"purpose", "note"})
    fields: dict[str, str] = {}
    name, data = None, bytearray()
    for piece in pieces:
        for event in parser.feed(piece):
            if isinstance(event, Field):
                fields[event.name] = event.value
            elif isinstance(event, FileBegins):
                name = event.filename
            elif isinstance(event, FileBytes):
                data += event.data
    parser.finish()
    return fields, name, bytes(data)


def cut(body: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(body[start : start + size])
        start += size
    return [*pieces, body[start:]]


# Bytes that look like a boundary's beginning are what a parser gets wrong.
TRICKY = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"-", b"--", b"x-B", f"\r\n--{BOUNDARY[:-1]}".encode(), b"\0", b"ab"]
    ),
    max_size=12,
).map(b"".join)


@settings(max_examples=150)
@given(st.one_of(TRICKY, st.binary(max_size=200)), st.booleans(), st.lists(st.integers(1, 40), max_size=12))
@example(f"\r\n--{BOUNDARY[:-1]}".encode(), True, [1] * 12)
def test_any_cut_gives_the_same(data: bytes, file_first: bool, sizes: list[int]) -> None:
    file = part("file", data, "a.jsonl", "Content-Type: application/octet-stream")
    body = form(file, PURPOSE) if file_first else form(PURPOSE, file)
    expected = ({"purpose": "fine-tune"}, "a.jsonl", data)
    assert parsed([body]) == expected
    assert parsed(cut(body, sizes)) == expected
    assert parsed(body[i : i + 1] for i in range(len(body))) == expected


@settings(max_examples=100)
@given(st.binary(max_size=120), st.integers(0, len(WHOLE)))
def test_what_is_no_form_is_refused_and_nothing_else(noise: bytes, at: int) -> None:
    try:
        parsed([WHOLE[:at] + noise + WHOLE[at:]])
        parsed([noise])
    except HarliError as error:
        assert len(error.message) < 1000


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_form", None),
        (b"{}", "invalid_form", None),
        (form(), "missing_required_parameter", "file"),
        (form(PURPOSE), "missing_required_parameter", "file"),
        (WHOLE[:-4], "invalid_form", None),  # without the end of the last boundary
        (WHOLE.removesuffix(f"--{BOUNDARY}--\r\n".encode()), "invalid_form", None),
        (form(PURPOSE, PURPOSE), "invalid_value", "purpose"),
        (form(part("file", b"a", "a"), part("file", b"b", "b")), "invalid_value", "file"),
        (form(part("colour", b"red")), "unknown_parameter", "colour"),
        (form(part("purpose", b"\xff")), "invalid_value", "purpose"),
        (form(part("purpose", b"a\0b")), "invalid_value", "purpose"),
        (form(part("purpose", b"a" * (MAX_FIELD_BYTES + 1))), "invalid_value", "purpose"),
        (form(part("file", b"YQ==", "a", "Content-Transfer-Encoding: base64")), "invalid_value", "file"),
        (form(f"--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\na\r\n".encode()), "invalid_form", None),
        (form(part("note", b"", None, *[f"X-{n}: 1" for n in range(9)])), "invalid_form", None),
        (form(part("note", b"", None, f"X: {'1' * 5000}")), "invalid_form", None),
        (form(part("n" * 5000, b"")), "invalid_form", None),
    ],
)
def test_refusals_name_the_part(body: bytes, code: str, param: Any) -> None:
    for pieces in ([body], [body[i : i + 1] for i in range(len(body))]):
        with pytest.raises(HarliError) as caught:
            parsed(pieces)
        assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "application/json", "multipart/mixed; boundary=x", "multipart/form-data"),
        *("multipart/form-data; boundary=", f"multipart/form-data; boundary={'x' * 71}"),
        "multipart/form-data; boundary=\xe9",
    ],
)
def test_a_body_of_another_type_is_refused(content_type: str) -> None:
    with pytest.raises(HarliError) as caught:
        parsed([WHOLE], content_type)
    assert caught.value.code == "invalid_content_type"


def test_boundaries_may_be_quoted_and_a_form_may_have_an_epilogue() -> None:
    quoted = f'multipart/form-data; charset=utf-8; boundary="{BOUNDARY}"'
    assert parsed([WHOLE, b"epilogue"], quoted)[2] == b"data"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a.jsonl", "a.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\a b.jsonl", "a b.jsonl"),
        ("", "upload"),
        ("..", ".."),  # a name like any other: no path is made of it
        ("a\r\nX: 1\x1b[31m.jsonl", "aX: 1[31m.jsonl"),
        ("dätä\u202egnp.jsonl", "dätägnp.jsonl"),
        ("x" * 300, "x" * 255),
        ("/", "upload"),
    ],
)
def test_names_are_for_display(given: str, shown: str) -> None:
    assert display_name(given) == shown

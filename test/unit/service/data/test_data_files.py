"""Data files as people have them: whatever their encoding and line ends, rows are read with their
lines."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.service.data import dataset
from sglang_harli.service.data.files import lines
from sglang_harli.service.data.files.lines import Line
from sglang_harli.service.data.files.packed import opener
from sglang_harli.service.data.files.row_json import RowReader
from support.data_files import A, B, lines_of, reasons, scan, tokenizer

__all__ = ["scan", "tokenizer"]  # fixtures

WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


# ------------------------------------------------------------------ encodings
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_utf16_and_utf32_are_read_with_or_without_a_mark(scan, name, mark):
    text = mark + "\r\n".join([lines_of(A, end=""), "", lines_of(B, end="")])
    assert scan(text.encode(name))[1] == scan(text)[1]
    assert [line for line, _ in scan(text.encode(name))[1]] == [1, 3]


@pytest.mark.parametrize("name", WIDE)
def test_a_bad_line_of_a_wide_file_has_its_place(scan, name):
    text = lines_of(A) + '{"prompt": "ü", completion: "x"}\n' + lines_of(B)
    assert reasons(scan, text.encode(name)) == {
        2: "not JSON: the field name completion without double quotes at column 17"
    }


@pytest.mark.parametrize(("name", "cut"), [("utf-16-le", 1), ("utf-32-be", 2)])
def test_a_wide_file_that_ends_within_a_character(scan, name, cut):
    content = (lines_of(A, B) + '{"prompt": "x').encode(name)[:-cut]
    found = reasons(scan, content)
    assert list(found) == [3]
    assert found[3].startswith(f"not {name[:6].upper()}: a broken character at column 13")


def test_half_a_pair_in_utf16_is_named(scan):
    content = lines_of(A).encode("utf-16-le") + '{"prompt": "\ud83d", "completion": "x"}'.encode(
        "utf-16-le", "surrogatepass"
    )
    assert reasons(scan, content) == {
        2: "not UTF-16: a broken character at column 13: save the file as UTF-8"
    }


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "latin-1",
            '{"prompt": "Möwe", "completion": "x"}',
            "byte 0xf6 (ö in Latin-1 or Windows-1252) at column 14",
        ),
        (
            "cp1252",
            '{"prompt": "it’s", "completion": "x"}',
            "byte 0x92 (’ in Latin-1 or Windows-1252) at column 15",
        ),
        (
            "cp1252",
            '  {"prompt": "€", "completion": "x"}',
            "byte 0x80 (€ in Latin-1 or Windows-1252) at column 15",
        ),
    ],
)
def test_other_encodings_are_named_with_line_byte_and_column(scan, name, text, says):
    content = lines_of(A).encode() + b"\n" + text.encode(name)
    assert reasons(scan, content) == {3: f"not UTF-8: {says}: save the file as UTF-8"}


def test_columns_count_characters(scan):
    content = '{"prompt": "ÄÖÜ👋'.encode() + b"\xff"
    assert "byte 0xff (ÿ in Latin-1 or Windows-1252) at column 17" in reasons(scan, content)[1]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff\ufeff{row}\n{row}\n",
        "\n\ufeff{row}\n\ufeff{row}\n",
        "{row}\n  \ufeff  {row}",
        "\ufeff\n{row}\n{row}",
        "\x1e{row}\n\x1e{row}\n",
        "{row}\x0c\n\x0b{row}\x0c",
    ],
)
def test_marks_and_separators_around_rows_are_taken_off(scan, content):
    found = scan(content.replace("{row}", json.dumps(B)))[1]
    assert [ids for _, ids in found] == [scan(json.dumps(B))[1][0][1]] * 2


def test_files_in_utf16_that_were_put_one_behind_the_other(scan):
    part = ("\ufeff" + lines_of(B)).encode("utf-16-le")
    assert [line for line, _ in scan(part + part)[1]] == [1, 2]


# ------------------------------------------------------------------ line ends
def test_lone_carriage_returns_end_lines(scan):
    found = scan(lines_of(A, end="\r") + "\r" + lines_of(B, end="\r"))[1]
    assert found == scan(lines_of(A) + "\n" + lines_of(B))[1]
    bad = lines_of(A, end="\r") + "{oops}\r"
    assert list(reasons(scan, bad)) == [2]
    assert scan(lines_of(A, B, end="\r").encode("utf-16"))[1] == scan(lines_of(A, B))[1]


def test_where_lines_end_in_line_feeds_a_carriage_return_is_white_space(scan):
    row = '{"prompt": "a",\r "completion": "b"}'
    assert [line for line, _ in scan(f"{row}\r\n\r\n{row}\n")[1]] == [1, 3]


def test_line_separators_of_unicode_stay_in_the_text(scan, tokenizer):
    row = {"prompt": "a", "completion": "b\u2028c\u2029d\u0085e"}
    [(line, ids)] = scan(lines_of(row))[1]
    assert line == 1 and ids == tokenizer.rows(row)[0].ids


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8).filter(
    lambda t: "<|" not in t
)
ROWS = st.lists(
    st.one_of(st.none(), st.builds(lambda p, c: {"prompt": p, "completion": "c" + c}, TEXT, TEXT)),
    min_size=1,
    max_size=6,
).filter(any)


@settings(deadline=None, max_examples=60)
@given(
    rows=ROWS,
    name=st.sampled_from(("utf-8", *WIDE)),
    mark=st.sampled_from(("", "\ufeff")),
    end=st.sampled_from(("\n", "\r\n", "\r")),
)
def test_a_row_keeps_its_line_number_whatever_the_file(tmp_path_factory, rows, name, mark, end):
    """None: a blank line."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    text = mark + end.join("" if row is None else json.dumps(row, ensure_ascii=False) for row in rows)
    if not mark and name != "utf-8" and rows[0] is None:
        text = text.lstrip("\r\n")
        rows = rows[next(i for i, row in enumerate(rows) if row) :]
    path.write_bytes(text.encode(name))
    coding = lines.coding_of(lines.read_head(opener(path)))
    reader = RowReader(coding)
    found = [(line.number, reader.read(line)) for line in lines.read_lines(opener(path), coding)]
    assert found == [(number, row) for number, row in enumerate(rows, 1) if row is not None]


def test_a_line_of_any_length_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "long.jsonl"
    path.write_bytes(("x" * (16 << 20) + "\n{}\n").encode("utf-16"))
    coding = lines.coding_of(lines.read_head(opener(path)))
    tracemalloc.start()
    try:
        assert list(lines.read_lines(opener(path), coding)) == [Line(1, None), Line(2, b"{}")]
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------ the figures beside a report
def test_the_figures_are_those_of_the_rows_that_are_accepted(tmp_path: Path, tokenizer):
    long, short = {"prompt": "a", "completion": "word " * 60}, {"prompt": "a", "completion": "b"}
    path = tmp_path / "data.jsonl"
    path.write_text(lines_of(long, long, short) + "oops\n" + lines_of({**short, "note": 1}), encoding="utf-8")
    options: dict[str, Any] = {"name": "data.jsonl", "max_length": 40}
    cut, error = dataset.look(path, tokenizer, on_overflow="truncate", **options)
    assert error is not None and [row["line"] for row in error.details] == [4]
    assert (cut.lines, cut.rows, cut.truncated, cut.dropped, cut.ignored_fields) == (5, 4, 2, 0, ["note"])
    fewer, _ = dataset.look(path, tokenizer, on_overflow="drop", **options)
    assert (fewer.rows, fewer.truncated, fewer.dropped) == (2, 0, 2)

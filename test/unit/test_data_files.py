"""Data files as people have them: read with the right lines, or refused in a sentence that says what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.errors import DataError
from sglang_harli.protocol.odd_values import odd_value
from sglang_harli.service import data_lines, dataset, row_json
from sglang_harli.service.chat_rows import RowError, RowTokenizer
from sglang_harli.service.data_lines import Coding, Line
from sglang_harli.service.row_json import RowReader
from sglang_harli.service.token_store import TokenReader, TokenWriter
from support.tokenizer import load_tokenizer, make_tokenizer_folder

WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
A = {"prompt": "Grüße an die Möwe 👋", "completion": " zurück\u2028und\u0085her"}
B = {"messages": [{"role": "user", "content": "wie weit?"}, {"role": "assistant", "content": "7 km\x0b"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return RowTokenizer(load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def scan(tmp_path, tokenizer):
    """(summary, the rows' lines and tokens) of a file with these bytes."""

    def run(content: bytes | str, **options: Any) -> tuple[Any, list[tuple[int, list[int]]]]:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with TokenWriter(tmp_path / "tokens") as writer:
            summary = dataset.scan(path, tokenizer, name="data.jsonl", writer=writer, **options)
        reader = TokenReader(tmp_path / "tokens")
        return summary, [(int(reader.lines[i]), reader.row(i)[0].tolist()) for i in range(len(reader))]

    return run


def lines_of(*rows: Any, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def refusal(scan, content: bytes | str) -> DataError:
    with pytest.raises(DataError) as caught:
        scan(content)
    return caught.value


def reasons(scan, content: bytes | str) -> dict[int, str]:
    return {row["line"]: row["reason"] for row in refusal(scan, content).details}


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
    coding = data_lines.coding_of(data_lines.read_head(path))
    reader = RowReader(coding)
    found = [(line.number, reader.read(line)) for line in data_lines.read_lines(path, coding)]
    assert found == [(number, row) for number, row in enumerate(rows, 1) if row is not None]


def test_a_line_of_any_length_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data_lines, "MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "long.jsonl"
    path.write_bytes(("x" * (16 << 20) + "\n{}\n").encode("utf-16"))
    coding = data_lines.coding_of(data_lines.read_head(path))
    tracemalloc.start()
    try:
        assert list(data_lines.read_lines(path, coding)) == [Line(1, None), Line(2, b"{}")]
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------ what stands in a row
@pytest.mark.parametrize(
    "odd", ["NaN", "-Infinity", "1e400", '[NaN, {"x": Infinity}]', "1" * 40, '"\\ud800"']
)
def test_values_that_json_has_not_do_no_harm_in_fields_that_are_not_used(scan, odd):
    summary, rows = scan('{"prompt": "a", "completion": "b", "score": ' + odd + "}")
    assert summary.ignored_fields == ["score"]
    assert rows == scan('{"prompt": "a", "completion": "b"}')[1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": NaN, "completion": "b"}', "field 'prompt' is NaN, which JSON has not"),
        ('{"prompt": "a", "completion": -Infinity}', "field 'completion' is Infinity, which JSON has not"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": NaN}]}',
            "message 2: field 'weight' is NaN, which JSON has not",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
            '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 1e999}}}]}',
            "field 'tools[0].function.parameters.maximum' is Infinity, which JSON has not",
        ),
        (
            '{"prompt": "a", "completion": "ab\\ud83d"}',
            "field 'completion' holds half of a surrogate pair (\\ud83d, character 3): write both halves or none",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "x\\udc00": 1}, {"role": "assistant", "content": "b"}]}',
            "message 1 has a field whose name holds half of a surrogate pair (\\udc00, character 2): write both "
            "halves or none",
        ),
    ],
)
def test_in_fields_that_are_used_they_are_named(scan, row, says):
    assert reasons(scan, lines_of(A) + row) == {2: says}


def test_whole_pairs_are_texts(scan, tokenizer):
    [(_, ids)] = scan('{"prompt": "\\ud83d\\udc4b", "completion": "b"}')[1]
    assert ids == tokenizer.rows({"prompt": "👋", "completion": "b"})[0].ids


@pytest.mark.parametrize(
    ("row", "field", "learned"),
    [
        ('{"prompt": "p", "completion": "first", "completion": "second"}', "field 'completion'", "second"),
        ('{"prompt": "other", "prompt": "p", "completion": "second"}', "field 'prompt'", "second"),
        (
            '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "content": "b"}]}',
            "message 2: field 'content'",
            "b",
        ),
        (
            '{"messages": [], "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]}',
            "field 'messages'",
            "b",
        ),
    ],
)
def test_fields_that_stand_twice_are_told_with_their_line(scan, tokenizer, row, field, learned):
    summary, [_, (line, ids)] = scan(lines_of(A) + row)
    assert summary.repeated_fields == [f"{field} (line 2)"] and line == 2
    assert f"there twice, the last one counts: {field} (line 2)" in summary.text()
    assert ids == tokenizer.rows(json.loads(row))[0].ids
    assert learned in tokenizer.served.decode(ids)


def test_ignored_fields_may_stand_twice_and_the_list_is_bounded(scan):
    assert scan('{"prompt": "a", "completion": "b", "id": 1, "id": 2}')[0].repeated_fields == []
    many = '{"prompt": "a", "completion": "b", "completion": "c"}\n' * 100
    assert len(scan(many)[0].repeated_fields) == dataset.MAX_NAMED
    names = "".join(json.dumps({**A, f"field {i} " + "x" * 900: i}) + "\n" for i in range(3000))
    ignored = scan(names)[0].ignored_fields
    assert len(ignored) == dataset.MAX_NAMED and all(len(name) < 80 for name in ignored)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", completion: "b"}', "the field name completion without double quotes at column 17"),
        ("{'prompt': 'a'}", '"\'" in place of a double quote at column 2'),
        ("{“prompt”: 1}", "U+201C (left double quotation mark) in place of a double quote at column 2"),
        ('{"prompt": "a", "completion": "b",}', "a comma before } at column 35"),
        ('{"messages": ["a",]}', "a comma before ] at column 19"),
        (
            '{"prompt": "a "b" c"}',
            "'b' where a comma or a closing bracket is expected (a quote within a text",
        ),
        ('{"prompt": "a"}{"prompt": "b"}', "a second value on the line (one row per line) at column 16"),
        ('{"prompt": "a"} // note', "a comment, which JSON has not at column 17"),
        ('{"prompt": "a"} ,', "a comma behind the row at column 17"),
        ('{"prompt": "a", "completion"', "the line ends in the middle of the value at column 29"),
        ('{"prompt": "a b', "the line ends in the middle of the text that begins at column 12"),
        (
            '{"prompt": "a\tb"}',
            "U+0009 (a control character) stands as such in a text, write \\t at column 14",
        ),
        ('{"prompt": None}', "None is Python's: JSON writes null, true and false at column 12"),
        ("undefined", "undefined is no JSON value at column 1"),
        ('{"prompt": "\\x"}', "a backslash that begins no JSON escape"),
        ("\u00a0{}", "U+00A0 (no-break space) where a JSON value is expected at column 1"),
        ("   \0\0", "U+0000 (NUL) where a JSON value is expected at column 4"),
        ('{"prompt" "a"}', "'\"' where a colon is expected at column 11"),
        ('{"id": ' + "9" * 5000 + "}", "it holds a number of thousands of digits"),
        ('{"x": ' + "[" * 20000 + "]" * 20000 + "}", "nested too deep: at most 100 levels are accepted"),
        (
            '{"tools": ' + "[" * 200 + "]" * 200 + "}",
            "field 'tools[0][0]' is nested too deep: at most 100 levels",
        ),
    ],
)
def test_why_a_line_is_no_json(text, says):
    with pytest.raises(RowError) as caught:
        RowReader(Coding()).read(Line(1, text.strip(" ").encode(), len(text) - len(text.lstrip(" "))))
    assert says in caught.value.reason


@given(st.text(max_size=40))
def test_every_text_is_a_value_or_a_reason(text):
    raw = text.encode("utf-8", "surrogatepass")
    try:
        RowReader(Coding()).read(Line(1, raw))
    except RowError as error:
        assert error.reason


def test_a_row_of_very_many_values_is_searched_in_little_memory():
    row = {"tools": [0] * 50_000, "messages": [{"x": 0}] * 1000, "score": float("nan")}
    tracemalloc.start()
    try:
        assert odd_value(row) is None
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_a_line_of_very_many_doubled_fields():
    text = '{"prompt": "a", "completion": "b", "tools": [' + '{"x": 0, "x": 0},' * 20_000 + "0]}"
    reader = RowReader(Coding())
    reader.read(Line(1, text.encode()))
    assert reader.twice[:2] == ["field 'tools[0].x'", "field 'tools[1].x'"]
    assert len(reader.twice) == row_json.MAX_DOUBLED


def test_nulls_are_as_if_they_were_not_there(scan):
    """As a table of all columns writes them."""
    calls = {"tool_calls": None, "name": None, "weight": None}
    tables = (
        {"messages": None, "prompt": "a", "completion": "b", "tools": None, "score": None},
        {"messages": [m | calls for m in B["messages"]], "prompt": None, "completion": None, "tools": None},
    )
    plain = ({"prompt": "a", "completion": "b"}, B)
    summary, rows = scan(lines_of(*tables))
    assert rows == scan(lines_of(*plain))[1]
    assert (summary.ignored_fields, summary.notes) == ([], [])


# ------------------------------------------------------------------ files that are not JSONL
def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", lines_of(A, B))
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())
    return file.getvalue()


OTHERS: dict[str, tuple[bytes | str, str]] = {
    "array": (json.dumps([A, B]), "one JSON array, not JSONL: write one row per line (jq -c '.[]' FILE"),
    "array, one row a line": ("[\n" + json.dumps(A) + ",\n" + json.dumps(B) + "\n]\n", "one JSON array"),
    "array, pretty": (json.dumps([A, B], indent=2), "one JSON array"),
    "array, larger than what is read ahead": (json.dumps([A] * 20_000, indent=1), "one JSON array"),
    "array in UTF-16": (json.dumps([A, B], indent=2).encode("utf-16"), "one JSON array"),
    "empty array": ("[]", "one JSON array"),
    "wrapped": (
        json.dumps({"data": [A, B]}),
        "the rows in its field 'data', not JSONL: write one row per line (jq",
    ),
    "wrapped, other name": (json.dumps({"version": 1, "my rows": [B]}), "jq -c '[\"my rows\"][]' FILE"),
    "wrapped, pretty": (json.dumps({"data": [A, B]}, indent=4), "field 'data'"),
    "wrapped, large": (json.dumps({"examples": [A] * 20_000}), "field 'examples'"),
    "pretty rows": ("\n".join(json.dumps(row, indent=2) for row in (B, A)), "over several lines each"),
    "one pretty row": (json.dumps(B, indent=2), "over several lines each"),
    "pretty rows with a fault": (json.dumps(B, indent=2).replace('"7 km', "7 km"), "over several lines each"),
    "commas": (lines_of(A, B, end=",\n"), "its lines end in commas (line 1 does)"),
    "commas but the last": (lines_of(A, B, end=" ,\n").rstrip(" ,\n"), "its lines end in commas"),
    "csv": (
        "prompt,completion\na,b\nc,d\n",
        "this is CSV, not JSONL: write it as JSONL (pandas.read_csv(FILE).to_json(",
    ),
    "csv with quotes": ('"question","answer"\n"a, b","c"\n', "this is CSV"),
    "csv with semicolons": (
        "id;text\n1;a\n",
        'this is CSV, not JSONL: write it as JSONL (pandas.read_csv(FILE, sep=";")',
    ),
    "tsv": ("prompt\tcompletion\na\tb\n", "this is TSV"),
    "gzip": (
        gzip.compress(lines_of(A).encode()),
        "a gzip archive, not JSONL: unpack it first (gunzip -k FILE)",
    ),
    "bzip2": (bz2.compress(lines_of(A).encode()), "a bzip2 archive"),
    "xz": (lzma.compress(lines_of(A).encode()), "an xz archive"),
    "zip": (zipped(), "a zip archive"),
    "tar": (tarred(), "a tar archive"),
    "parquet": (
        b"PAR1\x15\x04\x15\x10PAR1",
        "a Parquet file, not JSONL: write it as JSONL (pandas.read_parquet(FILE)",
    ),
    "pickle": (pickle.dumps([A]), "a Python pickle"),
    "binary": (bytes(range(256)) * 20, "this is binary data"),
    "html": ("<!DOCTYPE html>\n<html></html>", "this is XML or HTML"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_one_sentence_for_the_whole_file(scan, name):
    content, says = OTHERS[name]
    error = refusal(scan, content)
    assert error.details == []
    assert error.message.startswith("data.jsonl: ") and says in error.message
    assert len(error.message) < 250


@pytest.mark.parametrize(
    ("content", "bad"),
    [
        ("[1, 2]\n" + lines_of(A), [1]),
        ('{"prompt": "a", "completion"\n' + lines_of(A, B), [1]),
        ('{"messages": [\n' + lines_of(A, B), [1]),
        ('{"messages": [{"role": "user",\n' + lines_of(A, B), [1]),
        (lines_of(A) + json.dumps(B, indent=2), list(range(2, 14))),
        (lines_of(A) + lines_of(B).strip() + ",\n", [2]),
        (lines_of({"data": [A]}, {"data": [B]}), [1, 2]),
        (lines_of(A) + "prompt,completion\n", [2]),
    ],
)
def test_where_some_lines_are_rows_each_bad_line_is_named(scan, content, bad):
    assert list(reasons(scan, content)) == bad


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "a row in ShareGPT's form ('conversations' with 'from' and 'value')",
        ),
        ({"conversation": [{"role": "user", "content": "a"}]}, "the messages stand in field 'conversation'"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a row in Alpaca's form"),
        ({"prompt": None, "question": "a", "answer": "b"}, "a question and its answer"),
        ({"chosen": "a", "rejected": "b"}, "a preference pair"),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "a row in Gemini's form"),
        ({"text": "a"}, "found 'text', which is a text"),
        ({"Messages": B["messages"]}, "field 'Messages' must be written 'messages'"),
        ({"role": "user", "content": "a"}, "a single message"),
        ({"custom_id": "1", "method": "POST", "body": B}, "a request of a batch file"),
        (B["messages"], "this is a list of messages: write"),
    ],
)
def test_rows_of_other_tools_are_recognised_and_said_once(scan, row, says):
    error = refusal(scan, lines_of(*[row] * 500) + "\n" + lines_of(A))
    assert len(error.details) == 500
    assert re.match(r"data\.jsonl: 500 of 501 lines not accepted: lines 1 to 500: ", error.message)
    assert error.message.count("lines 1 to 500") == 1 and says in error.message
    assert (
        '{"messages"' in error.message or '{"prompt"' in error.message or "must be written" in error.message
    )


# ------------------------------------------------------------------ the figures beside a report
def test_the_figures_are_those_of_the_rows_that_are_accepted(tmp_path: Path, tokenizer):
    long = {"prompt": "a", "completion": "word " * 60}
    path = tmp_path / "data.jsonl"
    path.write_text(lines_of(long, long, B) + "oops\n" + lines_of({**B, "note": 1}), encoding="utf-8")
    options: dict[str, Any] = {"name": "data.jsonl", "max_length": 40}
    cut, error = dataset.look(path, tokenizer, on_overflow="truncate", **options)
    assert error is not None and [row["line"] for row in error.details] == [4]
    assert (cut.lines, cut.rows, cut.truncated, cut.dropped, cut.ignored_fields) == (5, 4, 2, 0, ["note"])
    fewer, _ = dataset.look(path, tokenizer, on_overflow="drop", **options)
    assert (fewer.rows, fewer.truncated, fewer.dropped) == (2, 0, 2)

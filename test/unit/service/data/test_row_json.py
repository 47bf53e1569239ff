"""A line as its JSON value: what is read that JSON has not, what is noted, and why a line is no
JSON."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.protocol.rows.odd_values import odd_value
from sglang_harli.service.data import dataset
from sglang_harli.service.data.files import row_json
from sglang_harli.service.data.files.lines import Coding, Line
from sglang_harli.service.data.files.row_json import RowReader
from sglang_harli.service.rows.encoder import RowError
from support.data_files import PAIR, A, B, lines_of, reasons, scan, tokenizer

__all__ = ["scan", "tokenizer"]  # fixtures


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
    summary, [_, (line, ids)] = scan(lines_of(PAIR if "prompt" in row else A) + row)
    assert summary.repeated_fields == [f"{field} (line 2)"] and line == 2
    assert f"there twice, the last one counts: {field} (line 2)" in summary.text()
    assert ids == tokenizer.rows(json.loads(row))[0].ids
    assert learned in tokenizer.served.decode(ids)


def test_ignored_fields_may_stand_twice_and_the_list_is_bounded(scan):
    assert scan('{"prompt": "a", "completion": "b", "id": 1, "id": 2}')[0].repeated_fields == []
    many = '{"prompt": "a", "completion": "b", "completion": "c"}\n' * 100
    assert len(scan(many)[0].repeated_fields) == dataset.MAX_NAMED
    names = "".join(json.dumps({**PAIR, f"field {i} " + "x" * 900: i}) + "\n" for i in range(3000))
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
    text = '{"messages": [], "tools": [' + '{"x": 0, "x": 0},' * 20_000 + "0]}"
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
    for table, row in zip(tables, plain, strict=True):
        summary, rows = scan(lines_of(table))
        assert rows == scan(lines_of(row))[1]
        assert (summary.ignored_fields, summary.notes) == ([], [])

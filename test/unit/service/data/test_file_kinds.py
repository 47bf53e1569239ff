"""Files of every kind that is read: the same rows whatever the file, each fault with its row, and
files that are made to fill a machine."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.service.data import dataset
from sglang_harli.service.data.files import file_format, json_array, lines, packed, source
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.rows.error import FileFault
from support.chat_templates import make_family
from support.data_files import PAIR, A, B, chat, lines_of, reasons, refusal, scan, tokenizer
from support.tokenizer import load_tokenizer

__all__ = ["scan", "tokenizer"]  # fixtures

LISTS = ("messages", "tools", "conversations", "history")


def csv_of(rows: list[dict[str, Any]], separator: str = ",") -> str:
    file = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, columns, delimiter=separator)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if k in LISTS else v for k, v in row.items()})
    return file.getvalue()


def parquet_of(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


KINDS: dict[str, Any] = {
    "jsonl": lambda rows: lines_of(*rows).encode(),
    "array": lambda rows: json.dumps(rows).encode(),
    "pretty array": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode("utf-16"),
    "csv": lambda rows: csv_of(rows).encode(),
    "tsv": lambda rows: csv_of(rows, "\t").encode("utf-16"),
    "parquet": parquet_of,
    "gzip jsonl": lambda rows: gzip.compress(lines_of(*rows).encode()),
    "gzip array": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "gzip csv": lambda rows: gzip.compress(csv_of(rows, ";").encode()),
}


# ------------------------------------------------------------------ the same rows
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), max_size=9
).filter(lambda text: "<|" not in text)
FORMS = (
    st.builds(lambda p, c: {"prompt": p, "completion": "c" + c}, TEXT, TEXT),
    st.builds(
        lambda q, a, w: chat("q" + q, "a" + a) | {"tools": []} | ({"id": w}), TEXT, TEXT, st.integers(0, 9)
    ),
    st.builds(
        lambda i, n, o: {
            "instruction": "i" + i,
            "input": n,
            "output": "o" + o,
            "system": "",
            "history": [["h", "a"]],
        },
        *(TEXT, TEXT, TEXT),
    ),
    st.builds(
        lambda q, a: {
            "conversations": [{"from": "human", "value": q + "q"}, {"from": "gpt", "value": a + "a"}]
        },
        *(TEXT, TEXT),
    ),
)


@settings(deadline=None, max_examples=12)
@given(rows=st.one_of(*(st.lists(form, min_size=1, max_size=4) for form in FORMS)))
def test_the_same_rows_give_the_same_tokens_whatever_the_file(tmp_path_factory, tokenizer, rows):
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for kind, write in KINDS.items():
        path = folder / "any.bin"
        path.write_bytes(write(rows))
        with TokenWriter(folder / "tokens") as writer:
            summary = dataset.scan(path, tokenizer, name="any.bin", writer=writer)
        with_tokens = TokenReader(folder / "tokens")
        ids = [tuple(part.tolist() for part in with_tokens.row(i)) for i in range(len(with_tokens))]
        found[kind] = ids, summary.format, summary.ignored_fields
        with_tokens.close()
    assert len(found["jsonl"][0]) == len(rows)
    assert all(one == found["jsonl"] for one in found.values())


@pytest.mark.parametrize(
    ("kind", "shown", "unit"),
    [
        ("jsonl", "JSONL", "line"),
        ("array", "a JSON array", "row"),
        ("pretty array", "a JSON array, in UTF-16", "row"),
        ("csv", "CSV", "row"),
        ("tsv", "CSV (separated by tabs), in UTF-16", "row"),
        ("parquet", "Parquet", "row"),
        ("gzip csv", "CSV (separated by semicolons), packed with gzip", "row"),
    ],
)
def test_what_a_file_is_is_said(scan, kind, shown, unit):
    summary, rows = scan(KINDS[kind]([PAIR, PAIR]))
    assert [number for number, _ in rows] == [1, 2]
    assert (summary.format, summary.file_text, summary.unit) == ("prompt_completion", shown, unit)
    assert f"format: prompt_completion in {shown}" in summary.text()


# ------------------------------------------------------------------ JSON arrays
def test_bad_rows_of_an_array_have_their_row_line_and_column(scan):
    content = json.dumps([B, A, B], indent=2).replace('"role": "assistant"', 'role: "assistant"', 1)
    error = refusal(scan, content)
    assert error.details[0]["row"] == 1 and error.details[0]["line"] == 2
    assert "without double quotes at line 9, column 9" in error.details[0]["reason"]
    assert "1 of 3 rows not accepted: row 1 (line 2): not JSON" in error.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "nothing to train on: it holds no row"),
        (" \n[ \n ] \n", "it holds no row"),
        (json.dumps([A, B])[:-1], "the file ends within row 2 of its JSON array: it was cut off"),
        (json.dumps([A, B])[:-30], "the file ends within row 2"),
        (json.dumps([A]).replace("an die", 'an "die'), "the file ends within row 1"),
        (json.dumps([A]) + " and more", "more stands behind the JSON array, which ends at line 1"),
        (json.dumps([A, B])[:-1] + ", ]", "row 3 of its JSON array is missing"),
        ("[\n" + json.dumps(A) + ",,\n" + json.dumps(B) + "]", "row 2 of its JSON array is missing"),
        ("[" * 100_000, "the file ends within row 1"),
    ],
)
def test_an_array_that_is_none(scan, content, says):
    assert says in refusal(scan, content).message


def test_faults_within_an_array_leave_the_other_rows(scan):
    bad = ["7", '"text"', '{"prompt": "a" "completion": "b"}', json.dumps(PAIR) + json.dumps(PAIR), "[[{}]]"]
    bad += ['{"tools": ' + "[" * 150 + "]" * 150 + "}", '{"prompt": "\\ud83d", "completion": "b"}']
    found = reasons(scan, "[" + ",\n".join([json.dumps(PAIR), *bad, json.dumps(PAIR)]) + "]")
    assert list(found) == list(range(2, 9))
    assert "a second value (a comma is missing before it)" in found[5]
    assert "half of a surrogate pair" in found[8]


@settings(deadline=None, max_examples=60)
@given(
    value=st.lists(
        st.recursive(
            st.text('"\\[]{},\n a', max_size=6) | st.integers(), lambda inner: st.lists(inner, max_size=3)
        ),
        max_size=5,
    ),
    piece=st.integers(1, 7),
    indent=st.sampled_from([None, 1]),
)
def test_elements_are_found_wherever_pieces_end(value, piece, indent):
    text = json.dumps(value, indent=indent).encode()
    before = json_array._PIECE
    json_array._PIECE = piece
    try:
        found = list(json_array.elements(io.BytesIO(text)))
    finally:
        json_array._PIECE = before
    assert [json.loads(line.text or b"") for line in found] == value
    assert [line.number for line in found] == list(range(1, len(value) + 1))
    if indent:
        assert all(
            line.text and text.split(b"\n")[(line.first or 0) - 1].strip()[:1] == line.text[:1]
            for line in found
        )


def test_an_array_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[" + json.dumps({"prompt": "x" * (3 << 20), "completion": "y"}))
        file.writelines("," + json.dumps(PAIR) for _ in range(2_000))
        file.write("]")
    about = file_format.look_at(path)
    tracemalloc.start()
    try:
        found = [
            (record.number, record.error and record.error.reason)
            for record in source.records(about)
            if record.error
        ]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert found == [(1, "the row is longer than 16 MiB")]


# ------------------------------------------------------------------ CSV
def test_faults_of_a_table(scan):
    good = csv_of([PAIR, PAIR])
    found = refusal(scan, good + 'one cell\n\n"a"b,c\na,b,c\n"two\nlines",d\n,\n')
    assert [(row["row"], row["line"]) for row in found.details] == [(3, 4), (4, 6), (5, 7), (7, 10)]
    said = [row["reason"] for row in found.details]
    assert said[0].startswith("it has 1 cells, and there are 2 columns")
    assert "more stands behind a quoted cell" in said[1] and said[2].startswith("it has 3 cells")
    assert said[3] == "field 'completion' is empty: there is nothing to learn"
    assert "row 3 (line 4): it has 1 cells" in found.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("question,answer\na,b\n", "its columns are 'question', 'answer': field 'messages'"),
        ("prompt,chosen,rejected\na,b,c\n", "this looks like preference data (DPO)"),
        ("Prompt,Completion\na,b\n", "field 'Prompt' must be written 'prompt'"),
        ("prompt,id\na,1\n", "field 'completion' is missing"),
        ("id,label\na,1\n", "its columns are 'id', 'label'; accepted: 'messages'; 'prompt' and"),
        ("prompt,completion,prompt\na,b,c\n", "column 'prompt' stands in its header twice"),
        ('prompt,completion\na,"b\nc\n', "the file ends within a quoted cell"),
        ("prompt,completion\n", "it holds no row"),
        (
            "messages\nhello\n",
            "column 'messages': not JSON: 'h' where a JSON value is expected at character 1",
        ),
        ("messages,id\n\"[{'role': 'user'}]\",1\n", "it is written as Python prints it, write json.dumps"),
        ("messages\n3\n", "field 'messages' must be a list"),
    ],
)
def test_a_table_that_is_not_read(scan, content, says):
    assert says in refusal(scan, content).message


def test_a_table_of_another_encoding_is_named(scan):
    found = reasons(scan, "prompt,completion\nMöwe,b\n".encode("cp1252"))
    assert found == {
        1: "not UTF-8: byte 0xf6 (ö in Latin-1 or Windows-1252) at character 2 of a cell: save the file as UTF-8"
    }


@pytest.mark.parametrize("first", ["{", "[", "[1", "<", "#", "PAR"])
def test_a_first_cell_may_begin_as_other_files_do(scan, first):
    row = {"prompt": first, "completion": "c"}
    assert scan(csv_of([row]))[1] == scan(lines_of(row))[1]


def test_marks_blank_names_and_quotes_of_spreadsheets(scan):
    summary, rows = scan('\ufeff,prompt,completion\r\n1,a,"b ""c"""\r\n'.encode())
    assert summary.ignored_fields == ["column 1"]
    assert rows == scan(lines_of({"prompt": "a", "completion": 'b "c"'}))[1]


def test_a_quote_that_is_never_closed_takes_bounded_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "open.csv"
    path.write_text('prompt,completion\na,b\nc,"' + "d\n" * (1 << 20))
    tracemalloc.start()
    try:
        _, error = dataset.look(path, tokenizer, name="open.csv")
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    assert (
        error is not None
        and "row 1, which begins at line 3, is longer than 1 MiB: is a quote" in error.message
    )


# ------------------------------------------------------------------ Parquet
def test_nulls_of_a_column_of_objects_are_left_out_and_that_is_said(tmp_path):
    def asked(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": f"{name}!", "tool_calls": [call]},
            ]
        }

    rows = [asked("here", {"place": "x"}), asked("at", {"time": 3})]
    with_tools = RowEncoder(load_tokenizer(make_family(tmp_path / "model", "qwen3")))
    path = tmp_path / "rows"
    path.write_bytes(parquet_of(rows))
    assert [
        record.value["messages"][1]["tool_calls"] for record in source.records(file_format.look_at(path))
    ] == [row["messages"][1]["tool_calls"] for row in rows]
    summary = dataset.scan(path, with_tools, name="rows")
    assert [note.code for note in summary.notes] == ["nulls_left_out"]
    assert "were left out (row 1)" in summary.text()


def test_columns_that_are_not_used_are_not_read(scan):
    rows = [PAIR | {"image": b"\xff\x00", "vector": [0.5, 1.0]}] * 3
    summary, found = scan(parquet_of(rows))
    assert len(found) == 3 and summary.ignored_fields == ["image", "vector"]


def test_rows_of_a_parquet_file_that_are_no_rows(scan):
    table = pa.table(
        {"prompt": pa.array([b"a", b"\xff", b"c"], pa.binary()), "completion": pa.array(["b", "b", None])}
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    assert reasons(scan, file.getvalue()) == {
        2: "it holds a value that JSON has not: bytes that are no text in UTF-8",
        3: "field 'completion' is null",
    }
    odd = pa.table(
        {"prompt": pa.array([b"a", b"\xff"], pa.binary()).view(pa.string()), "completion": ["b", "b"]}
    )
    file = io.BytesIO()
    pq.write_table(odd, file)
    assert reasons(scan, file.getvalue()) == {2: "it holds a text that is not UTF-8: byte 0xff"}
    late = pa.table({"prompt": pa.array([0, 2**62], pa.duration("ms")), "completion": ["b", "b"]})
    file = io.BytesIO()
    pq.write_table(late, file)
    assert "it holds a value that cannot be read" in reasons(scan, file.getvalue())[2]


def test_a_parquet_file_that_is_damaged_or_of_other_columns(scan):
    whole = parquet_of([PAIR] * 50)
    assert "does not end as one does" in refusal(scan, whole[:-9]).message
    assert "the Parquet file is damaged" in refusal(scan, whole[:4] + b"\xff" * 60 + whole[64:]).message
    lying = whole[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"
    assert "description of its columns has 1,073,741,824 bytes" in refusal(scan, lying).message
    assert (
        "this looks like preference data"
        in refusal(scan, parquet_of([{"chosen": "a", "rejected": "b"}])).message
    )


def test_a_dictionary_that_expands_without_end_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FREE_BYTES", 4 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * (1 << 20)]))
    path = tmp_path / "bomb"
    pq.write_table(pa.table({"prompt": ["q"] * 4000, "completion": text}), path)
    assert path.stat().st_size < 1 << 17
    found = source.records(file_format.look_at(path))
    with pytest.raises(FileFault, match="the Parquet file expands to more than 200 times its size"):
        assert sum(len(record.value["completion"]) for record in found) < 8 << 20


@pytest.mark.parametrize(
    ("pyarrow", "says"),
    [
        (
            "raise ImportError('no pyarrow here')",
            "reading Parquet needs pyarrow, which cannot be loaded where",
        ),
        ("import os; os._exit(1)", "the process that reads it ended, as it does where a file is damaged"),
    ],
)
def test_without_pyarrow_or_where_it_crashes_a_sentence_says_what_to_do(
    scan, tmp_path, monkeypatch, pyarrow, says
):
    content = parquet_of([PAIR])
    (tmp_path / "pyarrow.py").write_text(pyarrow)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(dataset.__file__).parents[3]}")
    found = refusal(scan, content).message
    assert says in found and "as JSONL" in found


def test_the_process_that_reads_parquet_has_a_bound_on_its_memory(tmp_path):
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "completion": ["x" * (96 << 20)]}), path, compression="zstd")
    code = (
        "from sglang_harli.service.data.files import parquet_child\n"
        f"parquet_child.MEMORY_BYTES = 48 << 20\nparquet_child.main({str(path)!r}, 1 << 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].startswith('F"reading a few rows of the Parquet file takes more than')
    assert done.returncode == 0 and not done.stderr


def test_neither_pyarrow_nor_torch_is_loaded(tmp_path):
    """By whatever file: Parquet is read by another process."""
    for name, kind in (("a.jsonl", "jsonl"), ("a.csv", "csv"), ("a.parquet", "parquet")):
        (tmp_path / name).write_bytes(KINDS[kind]([PAIR]))
    code = (
        "import sys, pathlib\n"
        "from sglang_harli.client.data_source import DataSource\n"
        "from sglang_harli.service.data.files import file_format, source\n"
        f"for path in pathlib.Path({str(tmp_path)!r}).iterdir():\n"
        "    DataSource(path).close()\n"
        "    assert [r.value['completion'] for r in source.records(file_format.look_at(path))]\n"
        "print([m for m in ('pyarrow', 'datasets', 'pandas', 'torch', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------ gzip
def test_a_gzip_archive_that_is_damaged(scan):
    whole = gzip.compress(lines_of(*[PAIR] * 3000).encode() + bytes(range(256)))
    assert "the gzip archive ends early" in refusal(scan, whole[:-20]).message
    assert "the gzip archive is damaged" in refusal(scan, whole[:-8] + bytes(8)).message
    assert (
        "the gzip archive is damaged"
        in refusal(scan, gzip.compress(lines_of(PAIR).encode()) + b"more").message
    )


def test_archives_one_behind_the_other_are_one_file(scan):
    part = gzip.compress(lines_of(PAIR).encode())
    assert [number for number, _ in scan(part + part)[1]] == [1, 2]


def test_a_gzip_archive_that_expands_without_end_is_refused_while_it_is_read(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(packed, "FREE_BYTES", 2 << 20)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20)))
    tracemalloc.start()
    try:
        _, error = dataset.look(path, tokenizer, name="bomb.gz")
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    assert error is not None and error.fault and "expands to more than 200 times its size" in error.fault
    monkeypatch.setattr(packed, "MAX_EXPANDED_BYTES", 1 << 19)
    with pytest.raises(FileFault, match="more than 0 MiB of rows, the most that a file may have"):
        file_format.look_at(path)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=120), st.sampled_from([b"", b"[", b"prompt,completion\n", b"\x1f\x8b\x08"]))
def test_any_bytes_are_rows_or_a_report(tmp_path_factory, tokenizer, content, start):
    path = tmp_path_factory.getbasetemp() / "any-kind"
    path.write_bytes(start + content)
    summary, error = dataset.look(path, tokenizer, name="any")
    assert summary.rows or (error is not None and error.message)

"""Files that are not JSONL and rows of other tools: each named once, with what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import time
import zipfile

import pytest

from support.data_files import PAIR, A, B, lines_of, reasons, refusal, scan, tokenizer

__all__ = ["scan", "tokenizer"]  # fixtures


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
    "wrapped": (
        json.dumps({"data": [A, B]}),
        "the rows in its field 'data': write one row per line (jq",
    ),
    "wrapped, other name": (json.dumps({"version": 1, "my rows": [B]}), "jq -c '[\"my rows\"][]' FILE"),
    "wrapped, pretty": (json.dumps({"data": [A, B]}, indent=4), "field 'data'"),
    "wrapped, large": (json.dumps({"examples": [A] * 20_000}), "field 'examples'"),
    "pretty rows": ("\n".join(json.dumps(row, indent=2) for row in (B, A)), "over several lines each"),
    "one pretty row": (json.dumps(B, indent=2), "over several lines each"),
    "pretty rows with a fault": (json.dumps(B, indent=2).replace('"7 km', "7 km"), "over several lines each"),
    "commas": (lines_of(A, B, end=",\n"), "its lines end in commas (line 1 does)"),
    "commas but the last": (lines_of(A, B, end=" ,\n").rstrip(" ,\n"), "its lines end in commas"),
    "gzip within gzip": (gzip.compress(gzip.compress(b"{}")), "a gzip archive within a gzip archive"),
    "parquet within gzip": (
        gzip.compress(b"PAR1\x15\x04\x15\x10PAR1"),
        "a Parquet file within a gzip archive",
    ),
    "encrypted parquet": (b"PARE\x15\x04\x15\x10PARE", "an encrypted Parquet file"),
    "zip within gzip": (gzip.compress(zipped()), "a zip archive"),
    "bzip2": (bz2.compress(lines_of(A).encode()), "a bzip2 archive"),
    "xz": (lzma.compress(lines_of(A).encode()), "an xz archive"),
    "zip": (zipped(), "a zip archive"),
    "tar": (tarred(), "a tar archive"),
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


@pytest.mark.parametrize("lead", ["", "\ufeff", "\n \x1e"])
@pytest.mark.parametrize("behind", ["", " and more", "\\u0000"])
def test_a_text_with_the_word_of_tar_archives_at_its_place_is_rows(scan, lead, behind):
    start = lead + '{"prompt": "'
    row = start + "x" * (257 - len(start.encode())) + f'ustar{behind}", "completion": "b"}}\n'
    assert row.encode()[257:262] == b"ustar"
    summary, rows = scan(row + lines_of(PAIR))
    assert summary.rows == len(rows) == 2


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_of_each_kind(scan, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())
    assert "a tar archive" in refusal(scan, file.getvalue()).message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversation": [{"from": "human", "value": "a"}]}, "rename it to 'conversations'"),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            "the messages stand in field 'conversations'",
        ),
        ({"conversation": [{"role": "user", "content": "a"}]}, "the messages stand in field 'conversation'"),
        ({"instruction": "a", "context": "", "response": "c"}, "a row in Dolly's form: rename 'response'"),
        ({"prompt": None, "question": "a", "answer": "b"}, "a question and its answer"),
        ({"chosen": "a", "rejected": "b"}, "this looks like preference data (DPO): 'chosen' and 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "this looks like preference data (DPO)"),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "preference data (DPO)"),
        (
            {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
            "preference data (DPO): 'preferred_output' and 'non_preferred_output'",
        ),
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
    mends = ('{"messages"', '{"prompt"', "must be written", "rename")
    assert any(mend in error.message for mend in mends)


@pytest.mark.parametrize(
    "first",
    ["prompt," + " " * 50_000 + "!", ",".join(["messages", *map(str, range(50_000))])],
    ids=["blanks", "columns"],
)
def test_a_first_line_of_any_length_is_looked_at_in_no_time(scan, first):
    began = time.process_time()
    refusal(scan, f"{first}\nrow\n")
    assert time.process_time() - began < 5.0

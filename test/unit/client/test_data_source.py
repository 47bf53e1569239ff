"""Data on the client's side: files that cannot be read are named, rows are checked where they are
given."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path

import pytest

from sglang_harli.client import data_source
from sglang_harli.client.data_source import DataSource
from sglang_harli.errors import DataError


def content(data) -> bytes:
    with DataSource(data) as source:
        return source.read(0, source.size)


def refusal(data) -> DataError:
    with pytest.raises(DataError) as caught:
        DataSource(data)
    return caught.value


# ------------------------------------------------------------------ files
@pytest.fixture
def odd_files(tmp_path: Path) -> dict[str, str]:
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "endpoint"))
    bound.close()
    reading, writing = os.pipe()
    os.close(writing)
    return {
        "folder": str(tmp_path),
        "pipe": str(tmp_path / "pipe"),
        "anonymous pipe": f"/dev/fd/{reading}",
        "socket": str(tmp_path / "endpoint"),
        "device": "/dev/null",
        "missing": str(tmp_path / "missing.jsonl"),
        "dangling": str(tmp_path / "dangling"),
        "loop": str(tmp_path / "loop"),
        "below a file": "/dev/null/x.jsonl",
        "dash": "-",
        "long": "x" * 5000,
        "null": "a\0b",
        "not UTF-8": "caf\udce9.jsonl",
        "half a pair": "\ud800.jsonl",
    }


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("folder", "is a folder: give a file"),
        ("pipe", "is a pipe: give a file (data are read more than once)"),
        ("anonymous pipe", "is a pipe: give a file"),
        ("socket", "is a socket"),
        ("device", "is a device"),
        ("missing", "missing.jsonl cannot be read: No such file or directory"),
        ("dangling", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("below a file", "Not a directory"),
        ("dash", "(standard input is not read: give a file)"),
        ("long", "File name too long"),
        ("null", "'a\\x00b' cannot be read: embedded null byte"),
        ("not UTF-8", r"caf\xe9.jsonl cannot be read: No such file"),
        ("half a pair", r"cannot be read"),
    ],
)
def test_what_is_no_readable_file_is_named(odd_files, kind, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = refusal(odd_files[kind])
    assert says in error.message
    assert (error.code, error.param) == ("unreadable_file", "data")
    error.message.encode()  # it can be shown, sent and stored


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.jsonl"
    path.write_bytes(b"{}")
    if os.geteuid() == 0:  # who may read everything

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(data_source, "open", refuse, raising=False)
    else:
        path.chmod(0)
    assert refusal(path).message == f"{path} cannot be read: Permission denied"


def test_a_name_of_any_bytes_is_a_text_on_the_wire(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\n\xf0\x9f\x91\x8b.jsonl"
    Path(os.fsdecode(path)).write_bytes(b"{}")
    with DataSource(os.fsdecode(path)) as source:
        assert source.name == "caf\\xe9\n👋.jsonl"
        assert source.read(0, 2) == b"{}"


def test_standard_input_that_is_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n")
    with path.open("rb") as file:
        assert content(f"/dev/fd/{file.fileno()}") == b"{}\n"


# ------------------------------------------------------------------ rows
def test_rows_are_written_as_a_file_would_hold_them():
    rows = [{"prompt": "Grüße\u2028👋", "completion": "b", "id": 2**200, "at": datetime.date(2026, 1, 2)}]
    rows += [{"messages": ({"role": "user", "content": "a"},), "score": 0.5}]
    del rows[0]["at"]  # which goes with numbers of 64 bits only
    found = content(row for row in rows)
    assert found.count(b"\n") == 2
    assert [json.loads(line) for line in found.splitlines()[:1]] == rows[:1]
    assert json.loads(content([{"prompt": "a", "completion": "b", "at": datetime.date(2026, 1, 2)}])) == {
        "prompt": "a",
        "completion": "b",
        "at": "2026-01-02",
    }


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": b"a", "completion": "b"}, "field 'prompt' is no JSON value"),
        ({"prompt": "a", "completion": "b\udcff"}, "field 'completion' holds half of a surrogate pair"),
        ({"prompt": "a", "completion": float("nan")}, "field 'completion' is NaN, which JSON has not"),
        ({"prompt": "a", "completion": "b", "x": {1, 2}}, "it is no JSON value"),
        ({"prompt": "a", "completion": "b", "x": b"1"}, "it is no JSON value"),
        ({"prompt": "a", "completion": "b", "\udcff": 1}, "is no JSON value"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": b"x"}]},
            "message 2: field 'content' is no JSON value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": float("inf")}]},
            "message 1: field 'weight' is Infinity",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"x": float("-inf")}]},
            "field 'tools[0].x' is Infinity",
        ),
    ],
)
def test_a_row_that_is_no_json_is_named_with_its_number_and_field(row, says):
    error = refusal([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, row])
    assert error.message.startswith("rows.jsonl: row 3 is not accepted: ") and says in error.message
    assert [detail["line"] for detail in error.details] == [3]
    error.message.encode()


def test_a_row_that_holds_itself():
    row: dict = {"prompt": "a", "completion": "b"}
    row["self"] = row
    assert "row 1 is not accepted" in refusal([row]).message
    deep: dict = {"tools": []}
    for _ in range(5000):
        deep["tools"] = [deep["tools"]]
    assert "nested too deep" in refusal([deep]).message


def test_one_row_is_no_list_of_rows():
    assert "give a list of rows" in refusal({"prompt": "a", "completion": "b"}).message


def test_numbers_that_do_no_harm():
    """NaN in a field that is not used, as data frames have it."""
    assert json.loads(content([{"prompt": "a", "completion": "b", "score": float("nan")}]))["score"] is None

"""Folders of rows at the client: saved by datasets, or of Parquet files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_harli.client import data_folder
from sglang_harli.client.data_source import DataSource
from sglang_harli.errors import DataError, UnsupportedError

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "id": i} for i in range(70)]


def saved(folder: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    """As ``Dataset.save_to_disk`` writes it, in two files."""
    folder.mkdir(parents=True)
    names = []
    for number, part in enumerate((rows[:40], rows[40:])):
        table = pa.Table.from_pylist(part, schema=pa.Table.from_pylist(rows).schema)
        names.append(f"data-{number:05}-of-00002.arrow")
        with (
            pa.OSFile(str(folder / names[-1]), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]} | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def rows_of(folder: Path) -> list[Any]:
    with DataSource(folder) as source:
        return [json.loads(line) for line in source.read(0, source.size).splitlines()]


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        DataSource(folder)
    return caught.value.message


def test_a_folder_saved_by_datasets(tmp_path):
    assert rows_of(saved(tmp_path / "set", ROWS)) == ROWS
    with DataSource(f"{tmp_path}/set/") as source:
        assert source.name == "set.jsonl"


def test_what_datasets_itself_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    made.shuffle(seed=1).select(range(20)).save_to_disk(str(tmp_path / "one"))
    assert sorted(row["id"] for row in rows_of(tmp_path / "one")) == sorted(made.shuffle(seed=1)["id"][:20])
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "dict"))
    assert rows_of(tmp_path / "dict") == ROWS


def test_splits_are_not_chosen_in_silence(tmp_path):
    folder = tmp_path / "set"
    saved(folder / "train", ROWS)
    saved(folder / "test", ROWS)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert f"holds the splits train, test: give the folder of one, such as {folder}/train" in refused(folder)
    assert rows_of(folder / "train") == ROWS


def test_parquet_files_in_their_order(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, part in enumerate((ROWS[:30], ROWS[30:])):
        pq.write_table(
            pa.Table.from_pylist(part), tmp_path / "set" / "data" / f"train-{number:05}-of-00002.parquet"
        )
    assert rows_of(tmp_path / "set") == ROWS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    assert "holds Parquet files of several splits (test, train)" in refused(tmp_path / "set")


def test_pictures_and_vectors_are_left_at_home(tmp_path):
    heavy = {"image": {"bytes": b"\xff", "path": "x"}, "vector": [0.5], "tags": ["a"], "meta": {"n": 1}}
    assert rows_of(saved(tmp_path / "set", [row | heavy for row in ROWS]))[0] == ROWS[0] | {
        "tags": ["a"],
        "meta": {"n": 1},
    }


def test_folders_that_are_not_read(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is a folder: give a file" in refused(tmp_path / "empty")
    assert "saved with an index" in refused(
        saved(tmp_path / "index", ROWS, _indices_data_files=[{"filename": "i"}])
    )
    away = saved(tmp_path / "away", ROWS, _data_files=[{"filename": "../set/data-00000-of-00002.arrow"}])
    assert "names files of other folders" in refused(away)
    broken = saved(tmp_path / "broken", ROWS)
    (broken / "data-00001-of-00002.arrow").write_bytes(b"x" * 100)
    assert "broken: data-00001-of-00002.arrow cannot be read" in refused(broken)
    (broken / "state.json").write_text("[]")
    assert "state.json holds no object" in refused(broken)


def test_rows_beyond_the_limit_are_not_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(data_folder, "MAX_DATA_BYTES", 500)
    assert "has more than 500 bytes of rows" in refused(saved(tmp_path / "set", ROWS))


def test_without_pyarrow_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    folder = saved(tmp_path / "set", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"needs pyarrow, which cannot be loaded here .*: install it"):
        DataSource(folder)

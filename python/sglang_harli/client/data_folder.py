"""A folder of rows as one JSONL file: saved by ``datasets`` (``save_to_disk``), or of Parquet
files.

pyarrow is imported when such a folder is read, ``datasets`` never.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sglang_harli.errors import DataError, UnsupportedError
from sglang_harli.protocol.public import MAX_DATA_BYTES
from sglang_harli.protocol.rows import arrow_rows, forms

SPOOL_BYTES = 8 << 20  # rows beyond that go to a temporary file
_SHARD = re.compile(r"(.+?)[-_.]\d+[-_]of[-_]\d+")  # train-00000-of-00002

Batches = Callable[[], Iterator[Any]]  # of pyarrow.RecordBatch


def is_data(folder: Path) -> bool:
    """Whether it is such a folder: another one is no training data."""
    return (folder / "dataset_dict.json").is_file() or _is_saved(folder) or bool(_parquet_files(folder))


def spool(folder: Path, shown: str) -> BinaryIO:
    """Its rows as a file of JSON lines, which is gone once it is closed.  ``shown``: its name.

    Raises:
        DataError: it cannot be read, has several splits, or too many bytes of rows.
        UnsupportedError: pyarrow is not installed.
    """
    parts = _parts(folder, shown)
    file: Any = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  (DataSource closes it)
    try:
        for number, row in enumerate(_rows(parts, shown), 1):
            if row.problem:
                raise _unreadable(f"{shown}: row {number} holds {row.problem}")
            file.write(row.text + b"\n")
            if file.tell() > MAX_DATA_BYTES:
                raise DataError(
                    f"{shown} has more than {MAX_DATA_BYTES} bytes of rows, the most that is accepted: split it",
                    param="data",
                )
    except BaseException:
        file.close()
        raise
    return file


def _parts(folder: Path, shown: str) -> list[Path]:
    """The files with rows, in their order."""
    if (folder / "dataset_dict.json").is_file():
        splits = [str(name) for name in _json(folder / "dataset_dict.json", shown).get("splits", [])]
        found = [name for name in splits if _is_saved(folder / name)]
        if len(found) != 1:
            what = f"the splits {', '.join(found)}" if found else "no split"
            raise _unreadable(f"{shown} holds {what}: give the folder of one, such as {shown}/train")
        folder = folder / found[0]
    if _is_saved(folder):
        state = _json(folder / "state.json", shown)
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise _unreadable(
                f"{shown} was saved with an index beside its rows, by an old version of datasets: load it and save it again"
            )
        names = [str(part.get("filename")) for part in state.get("_data_files", []) if isinstance(part, dict)]
        if any(Path(name).name != name for name in names):
            raise _unreadable(f"{shown}: its state.json names files of other folders")
        return [folder / name for name in names]
    files = _parquet_files(folder)
    splits = sorted({found[1] if (found := _SHARD.match(path.stem)) else "" for path in files})
    if len(splits) > 1:
        named = ", ".join(name or "other files" for name in splits)
        raise _unreadable(
            f"{shown} holds Parquet files of several splits ({named}): give a folder with those of one"
        )
    return files


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _parquet_files(folder: Path) -> list[Path]:
    """In it, or in its folder ``data``, where datasets of the hub have them."""
    for place in (folder, folder / "data"):
        if found := sorted(place.glob("*.parquet")):
            return found
    return []


def _json(path: Path, shown: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(f"{shown}: {path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise _unreadable(f"{shown}: {path.name} holds no object")
    return found


def _rows(parts: list[Path], shown: str) -> Iterator[arrow_rows.JsonRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnsupportedError(
            f"reading the folder {shown} needs pyarrow, which cannot be loaded here ({error}): install it, or "
            "give the rows as JSONL",
            param="data",
        ) from error
    for path in parts:
        try:
            if path.suffix == ".parquet":
                file = pq.ParquetFile(path)
                wanted = _wanted(file.schema_arrow)
                batches = file.iter_batches(arrow_rows.BATCH_ROWS, columns=wanted)
            else:
                batches = _arrow_batches(pa, path)
            for batch in batches:
                yield from arrow_rows.json_rows(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(f"{shown}: {path.name} cannot be read: {error}") from error


def _arrow_batches(pa: Any, path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        wanted = _wanted(stream.schema)
        for whole in stream:
            batch = whole.select(wanted)
            for at in range(0, batch.num_rows, arrow_rows.BATCH_ROWS):
                yield batch.slice(at, arrow_rows.BATCH_ROWS)


def _wanted(schema: Any) -> list[str]:
    """The columns to send: of other columns those that are no bytes and no vectors."""
    return [field.name for field in schema if field.name in forms.ALL or _is_light(field.type)]


def _is_light(kind: Any) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    if not inner:
        return "binary" not in str(kind) and not str(kind).startswith("extension")
    listed = "list" in str(kind).split("<")[0]
    return all(_is_light(part) for part in inner) and not (listed and _is_number(inner[0]))


def _is_number(kind: Any) -> bool:
    return str(kind).startswith(("int", "uint", "float", "double", "half", "bool"))


def _unreadable(message: str) -> DataError:
    return DataError(message, code="unreadable_file", param="data")

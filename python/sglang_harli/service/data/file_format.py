"""What a file is that is not JSONL: one sentence that names it and says how to make JSONL of it.

Found from the file's beginning: its lines would each be refused with a reason that says less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli.protocol.odd_values import USED
from sglang_harli.service.data.lines import HEAD_BYTES, Coding, coding_of, decode, read_head

_PANDAS = 'pandas.{read}(FILE).to_json("rows.jsonl", orient="records", lines=True)'
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "unpack it first (gunzip -k FILE)"),
    (b"PK\x03\x04", "a zip archive, or an office document", "unpack it, or save its table as JSONL"),
    (b"PK\x05\x06", "an empty zip archive", "give a file with rows"),
    (b"PAR1", "a Parquet file", f"write it as JSONL ({_PANDAS.format(read='read_parquet')})"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first (unzstd -k FILE)"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it first (unxz -k FILE)"),
    (b"BZh", "a bzip2 archive", "unpack it first (bunzip2 -k FILE)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"ARROW1", "an Arrow file", f"write it as JSONL ({_PANDAS.format(read='read_feather')})"),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        "write it as JSONL (datasets.Dataset.from_file(FILE).to_json(...))",
    ),
    (b"ORC", "an ORC file", f"write it as JSONL ({_PANDAS.format(read='read_orc')})"),
    (b"Obj\x01", "an Avro file", "write it as JSONL"),
    (b"SQLite format 3\0", "an SQLite database", "write its table as JSONL"),
    (b"%PDF-", "a PDF", "give rows of text"),
    (b"\x89HDF", "an HDF5 file", "write it as JSONL"),
    (b"\x93NUMPY", "a NumPy array", "give rows of text"),
    *(
        (bytes((0x80, protocol)), "a Python pickle", "write it as JSONL (a pickle is never opened)")
        for protocol in (2, 3, 4, 5)
    ),
)
_CELL = re.compile(r'\s*"?[\w .:/-]{1,64}"?\s*\Z')
_COLUMNS = {
    *("prompt", "completion", "messages", "text", "question", "answer", "instruction", "input", "output"),
    *("role", "content", "response", "query", "source", "target", "label", "id"),
}
_WRAPPERS = {"data", "rows", "examples", "items", "records", "samples", "train", "dataset", "instances"}
_FIRST_FIELD = re.compile(r'\{\s*"([^"\\]{1,100})"\s*:\s*\[\s*[\[{]')


@dataclass(frozen=True, slots=True)
class DataFile:
    """The coding of a training file; ``refusal``: why it cannot be JSONL, None: it may be."""

    coding: Coding
    refusal: str | None = None


def look_at(path: Path) -> DataFile:
    """Read the beginning of a file; raises OSError."""
    head = read_head(path)
    named = _archive(head)
    if named is not None:
        return DataFile(Coding(), named)
    coding = coding_of(head)
    text = decode(head, coding.name)
    return DataFile(coding, _text_format(text, coding, len(head) < HEAD_BYTES))


def _archive(head: bytes) -> str | None:
    for magic, what, mend in _MAGIC:
        if head.startswith(magic):
            return f"this is {what}, not JSONL: {mend}"
    # A text may have the word at that very place: JSON is none, whatever stands in it.
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n\x0b\x0c\x1e")[:1]
    if head[257:263] in (b"ustar\0", b"ustar ") and start not in (b"{", b"["):
        return "this is a tar archive, not JSONL: unpack it first (tar -xf FILE)"
    block = head[:512]
    odd = sum(byte < 9 or 13 < byte < 27 or 27 < byte < 30 for byte in block)
    if (
        odd * 20 > len(block)
        and b"\0" in block
        and coding_of(head).name == "utf-8"
        and block[:1] not in b"{["
    ):
        return "this is binary data, not JSONL: give a text file with one JSON object per line"
    return None


def _text_format(text: str, coding: Coding, whole: bool) -> str | None:
    """``text``: the beginning of the file, or all of it."""
    lines = list(_lines(text, coding, whole))
    if not lines:
        return None
    number, first = lines[0]
    second = lines[1][1] if len(lines) > 1 else None
    start = first[:1]
    if start == "[":
        return _list(first, second)
    if start == "{":
        return _object(text.lstrip("\ufeff \t\r\n\x0b\x0c\x1e"), number, first, second, whole)
    if start == "<":
        return "this is XML or HTML, not JSONL: write one JSON object per line"
    return _table(first, second)


def _lines(text: str, coding: Coding, whole: bool) -> Iterator[tuple[int, str]]:
    """The first two lines that are not blank; the second only where it is there in full."""
    found = 0
    for number, line in enumerate(re.split(r"\r\n|\r|\n" if coding.lone_cr else r"\n", text), 1):
        stripped = line.strip("\ufeff \t\r\n\x0b\x0c\x1e")
        if stripped:
            yield number, stripped
            found += 1
        if found == 2:
            return


def _list(first: str, second: str | None) -> str | None:
    if second is not None and isinstance(_value(first), list):
        return None  # each line is a list: its own fault
    return "this is one JSON array, not JSONL: write one row per line (jq -c '.[]' FILE > rows.jsonl)"


def _object(text: str, number: int, first: str, second: str | None, whole: bool) -> str | None:
    value = _value(first)
    if isinstance(value, dict):
        wrapper = _wrapper(value) if second is None and whole else None
        return _wrapped(wrapper) if wrapper else None
    if isinstance(_value(first.rstrip(",")), dict) and first.endswith(","):
        return (
            f"its lines end in commas (line {number} does), which JSONL has not: take them off "
            "(sed 's/,[[:space:]]*$//' FILE > rows.jsonl)"
        )
    match = _FIRST_FIELD.match(text)
    wrapper = match[1] if match and match[1] in _WRAPPERS else None
    if second is None:
        return _wrapped(wrapper) if wrapper and not whole else None
    if isinstance(_value(second), dict) or not _goes_on(text):
        return None
    if wrapper:
        return _wrapped(wrapper)
    return (
        "its rows are written over several lines each, JSONL has one row per line: "
        "write them so (jq -c . FILE > rows.jsonl)"
    )


def _goes_on(text: str) -> bool:
    """Whether the first line's value is JSON to somewhere behind the second line's start."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
    except ValueError:
        return False
    second = re.search(r"[\r\n]\s*", text)
    return second is not None and end > second.end()


def _wrapper(row: dict[str, Any]) -> str | None:
    """The field that holds the rows, where the one object of a file is no row itself."""
    if any(name in row for name in USED):
        return None
    for name, value in row.items():
        rows = value if isinstance(value, list) else []
        if (
            rows
            and all(isinstance(part, dict) for part in rows[:10])
            and (name in _WRAPPERS or any(field in rows[0] for field in USED))
        ):
            return name
    return None


def _wrapped(name: str) -> str:
    path = f".{name}" if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else f"[{json.dumps(name)}]"
    return (
        f"this is one JSON object with the rows in its field {name!r}, not JSONL: write one row per line "
        f"(jq -c '{path}[]' FILE > rows.jsonl)"
    )


def _table(first: str, second: str | None) -> str | None:
    for sign, what, read in ((",", "CSV", ""), ("\t", "TSV", r', sep="\t"'), (";", "CSV", ', sep=";"')):
        cells = first.split(sign)
        names = {cell.strip(' "').lower() for cell in cells}
        if len(cells) < 2 or not all(_CELL.match(cell) for cell in cells) or not names & _COLUMNS:
            continue
        if second is None or not second.startswith(("{", "[")):
            make = _PANDAS.format(read="read_csv").replace("(FILE)", f"(FILE{read})")
            return f"this is {what}, not JSONL: write it as JSONL ({make})"
    return None


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

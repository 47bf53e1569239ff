"""What a training file is, seen from its beginning, whatever its name: its kind and encoding, or
one sentence that says why it is not read and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli.protocol.rows.forms import ALL
from sglang_harli.service.data.files import packed
from sglang_harli.service.data.files.lines import HEAD_BYTES, UTF8, Coding, coding_of, decode, read_head
from sglang_harli.service.data.files.packed import Opener
from sglang_harli.service.rows.error import FileFault

JSONL, ARRAY, CSV, PARQUET = "jsonl", "json", "csv", "parquet"
ACCEPTED = "JSONL, a JSON array, CSV and Parquet are read"
_PANDAS = 'pandas.{read}(FILE).to_json("rows.jsonl", orient="records", lines=True)'
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, or an office document", "unpack it, or save its table as JSONL"),
    (b"PK\x05\x06", "an empty zip archive", "give a file with rows"),
    (b"PARE", "an encrypted Parquet file", "write it unencrypted"),
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
# A cell without the blanks around it: a long run of them would take quadratic time.
_CELL = re.compile(r'"?[\w .:/-]{0,64}"?\Z')
_COLUMNS = {
    *ALL,
    *(
        "text",
        "question",
        "answer",
        "role",
        "content",
        "response",
        "query",
        "source",
        "target",
        "label",
        "id",
    ),
    *("chosen", "rejected"),
}
_ALONE = ("messages", "conversations")  # columns that may be a table's only one
_WRAPPERS = {"data", "rows", "examples", "items", "records", "samples", "train", "dataset", "instances"}
_FIRST_FIELD = re.compile(r'\{\s*"([^"\\]{1,100})"\s*:\s*\[\s*[\[{]')


@dataclass(frozen=True, slots=True)
class FileFormat:
    """What a file is.  ``opener``: its bytes, unpacked."""

    path: Path
    opener: Opener
    kind: str  # JSONL, ARRAY, CSV or PARQUET
    coding: Coding = UTF8
    gzip: bool = False
    separator: str = ","  # of the cells of a CSV file

    @property
    def unit(self) -> str:
        """What a number in messages counts."""
        return "line" if self.kind == JSONL else "row"

    @property
    def shown(self) -> str:
        """For people: ``CSV (separated by tabs), in UTF-16, packed with gzip``."""
        text = {JSONL: "JSONL", ARRAY: "a JSON array", CSV: "CSV", PARQUET: "Parquet"}[self.kind]
        if self.separator != ",":
            text += f" (separated by {'tabs' if self.separator == chr(9) else 'semicolons'})"
        if self.coding.name != "utf-8":
            text += f", in {self.coding.shown}"
        return text + (", packed with gzip" if self.gzip else "")


def look_at(path: Path) -> FileFormat:
    """Read the beginning of a file.  Raises OSError; FileFault: it is none that is read."""
    opener = packed.opener(path)
    head = read_head(opener)
    is_packed = head.startswith(packed.GZIP)
    if is_packed:
        opener = packed.unpacking(path)
        head = read_head(opener)
        if head.startswith(packed.GZIP):
            raise FileFault("this is a gzip archive within a gzip archive: unpack it once (gunzip -k FILE)")
    if head.startswith(b"PAR1"):
        if is_packed:
            raise FileFault(
                "this is a Parquet file within a gzip archive: unpack it (gunzip -k FILE), Parquet packs its own columns"
            )
        return FileFormat(path, opener, PARQUET)
    _check_binary(head)
    coding = coding_of(head)
    kind, separator = _text_format(decode(head, coding.name), coding, len(head) < HEAD_BYTES)
    return FileFormat(path, opener, kind, coding, is_packed, separator)


def _check_binary(head: bytes) -> None:
    for magic, what, mend in _MAGIC:
        if head.startswith(magic):
            raise FileFault(f"this is {what}, not rows of text: {mend} ({ACCEPTED})")
    # A text may have the word at that very place: JSON is none, whatever stands in it.
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n\x0b\x0c\x1e")[:1]
    if head[257:263] in (b"ustar\0", b"ustar ") and start not in (b"{", b"["):
        raise FileFault(
            f"this is a tar archive, not rows of text: unpack it first (tar -xf FILE) ({ACCEPTED})"
        )
    block = head[:512]
    odd = sum(byte < 9 or 13 < byte < 27 or 27 < byte < 30 for byte in block)
    if (
        odd * 20 > len(block)
        and b"\0" in block
        and coding_of(head).name == "utf-8"
        and block[:1] not in b"{["
    ):
        raise FileFault(f"this is binary data, not rows of text: give another file ({ACCEPTED})")


def _text_format(text: str, coding: Coding, whole: bool) -> tuple[str, str]:
    """Kind and separator.  ``text``: the beginning of the file, or all of it."""
    lines = list(_lines(text, coding, whole))
    if not lines:
        return JSONL, ","
    number, first = lines[0]
    second = lines[1][1] if len(lines) > 1 else None
    start = first[:1]
    if start == "[":
        # Where the first line is a list, each line may be: its own fault.
        return (JSONL if second is not None and isinstance(_value(first), list) else ARRAY), ","
    if start == "{":
        refusal = _object(text.lstrip("\ufeff \t\r\n\x0b\x0c\x1e"), number, first, second, whole)
        if refusal:
            raise FileFault(refusal)
        return JSONL, ","
    if start == "<":
        raise FileFault(f"this is XML or HTML, not rows of text: give another file ({ACCEPTED})")
    separator = _separator(first, second)
    return (CSV, separator) if separator else (JSONL, ",")


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
    if any(name in row for name in ALL):
        return None
    for name, value in row.items():
        rows = value if isinstance(value, list) else []
        if (
            rows
            and all(isinstance(part, dict) for part in rows[:10])
            and (name in _WRAPPERS or any(field in rows[0] for field in ALL))
        ):
            return name
    return None


def _wrapped(name: str) -> str:
    path = f".{name}" if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else f"[{json.dumps(name)}]"
    return (
        f"this is one JSON object with the rows in its field {name!r}: write one row per line "
        f"(jq -c '{path}[]' FILE > rows.jsonl)"
    )


def _separator(first: str, second: str | None) -> str | None:
    """What parts the cells, where the first line has a table's names of columns."""
    if second is not None and isinstance(_value(second), dict):
        return None  # JSONL whose first line is at fault: in a table such a cell would be quoted
    for sign in (",", "\t", ";"):
        cells = first.split(sign)
        names = {cell.strip(' "').lower() for cell in cells}
        columns = _COLUMNS if len(cells) > 1 else {*_ALONE}
        if all(_CELL.match(cell.strip()) for cell in cells) and names & columns:
            return sign
    return None


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

"""The rows of a CSV file: its first row names the columns, lists stand in cells as JSON texts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from sglang_harli.service.data.files import lines, tables
from sglang_harli.service.data.files.record import Record
from sglang_harli.service.data.files.row_json import RowReader, check_values, not_utf8
from sglang_harli.service.rows.error import FileFault, RowError

_BROKEN = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as surrogateescape has them


class _Feed:
    """The file's lines for the csv module; FileFault: a row has more bytes than a row may."""

    def __init__(self, file: BinaryIO | io.BufferedIOBase) -> None:
        self._file = file
        self._size = 0  # of the row so far
        self.line = 0  # read last
        self.first = 1  # of the row
        self.number = 0  # of the row; the header is none

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(lines.MAX_LINE_BYTES + 1):
            self.line += 1
            self._size += len(raw)
            if self._size > lines.MAX_LINE_BYTES:
                raise FileFault(
                    f"row {self.number}, which begins at line {self.first}, is longer than "
                    f"{lines.MAX_LINE_BYTES >> 20} MiB: is a quote never closed there?"
                )
            yield raw.decode("utf-8", "surrogateescape")

    def next_row(self) -> None:
        self._size, self.first = 0, self.line + 1


def records(file: BinaryIO | io.BufferedIOBase, separator: str, reader: RowReader) -> Iterator[Record]:
    """The rows, numbered from 1 behind the header.  Raises FileFault: the columns are not those of
    any accepted form, or a row never ends."""
    csv.field_size_limit(lines.MAX_LINE_BYTES)  # of this process; 128 KiB unless it is set
    feed = _Feed(file)
    table = csv.reader(feed, delimiter=separator, strict=True)
    columns = _header(table, feed)
    while True:
        feed.next_row()
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            feed.number += 1
            yield Record(feed.number, feed.first, error=RowError(f"not CSV: {_why(str(error))}"))
            continue
        if cells:  # else a blank line
            feed.number += 1
            yield _record(feed, columns, cells, reader)


def _header(table: Iterator[list[str]], feed: _Feed) -> list[str]:
    cells: list[str] = []
    try:
        while not any(cells):
            feed.next_row()
            cells = next(table)
    except (StopIteration, csv.Error) as error:
        raise FileFault(
            f"its first row does not name the columns of a CSV file: {_why(str(error))}"
        ) from error
    cells = [cell.strip("\ufeff \t") or f"column {at}" for at, cell in enumerate(cells, 1)]
    tables.check_columns(cells)
    return cells


def _record(feed: _Feed, columns: list[str], cells: list[str], reader: RowReader) -> Record:
    try:
        broken = next((found for cell in cells if (found := _BROKEN.search(cell))), None)
        if broken:
            raise not_utf8(ord(broken[0]) - 0xDC00, f"at character {broken.start() + 1} of a cell")
        if len(cells) != len(columns):
            raise RowError(
                f"it has {len(cells)} cells, and there are {len(columns)} columns: put cells that hold the "
                "separator or a line break into quotes"
            )
        row: dict[str, Any] = tables.complete(dict(zip(columns, cells, strict=True)), reader)
        check_values(row)
    except RowError as error:
        return Record(feed.number, feed.first, error=error)
    return Record(feed.number, feed.first, row)


def _why(text: str) -> str:
    """The csv module's words, with what to do."""
    if "unexpected end" in text:
        return "the file ends within a quoted cell: a quote is never closed"
    if "expected after" in text:
        return 'more stands behind a quoted cell (a quote within a cell is written "")'
    return text or "there is none"

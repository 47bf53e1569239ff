"""A training file as rows, whatever kind it is of: the kind is seen from its content each time."""

from __future__ import annotations

from collections.abc import Generator

from sglang_harli.service.data.files import csv_table, file_format, json_array, parquet
from sglang_harli.service.data.files.file_format import FileFormat
from sglang_harli.service.data.files.lines import Line, read_lines, utf8
from sglang_harli.service.data.files.record import Record
from sglang_harli.service.data.files.row_json import RowReader
from sglang_harli.service.rows.error import RowError


def records(about: FileFormat) -> Generator[Record]:
    """The file's rows one after the other, in bounded memory.  Close it to end early.

    Raises FileFault: the file cannot be read on; OSError.
    """
    reader = RowReader(about.coding)
    if about.kind == file_format.PARQUET:
        yield from parquet.records(about.path, reader)
    elif about.kind == file_format.CSV:
        with about.opener() as raw, utf8(raw, about.coding) as file:
            yield from csv_table.records(file, about.separator, reader)
    elif about.kind == file_format.ARRAY:
        with about.opener() as raw, utf8(raw, about.coding) as file:
            yield from (_of_line(line, reader) for line in json_array.elements(file))
    else:
        yield from (_of_line(line, reader) for line in read_lines(about.opener, about.coding))


def _of_line(line: Line, reader: RowReader) -> Record:
    try:
        return Record(line.number, line.first, reader.read(line), twice=tuple(reader.twice))
    except RowError as error:
        return Record(line.number, line.first, error=error)

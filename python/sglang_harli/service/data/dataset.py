"""From a streamed JSONL file to token rows, or to one report of every line that is not accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from sglang_harli.errors import DataError, HarliError, NotReadyError, grouped
from sglang_harli.protocol.public import BUSY
from sglang_harli.service.data import file_format
from sglang_harli.service.data.lines import Line, read_lines
from sglang_harli.service.data.row_json import RowReader
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.rows import foreign
from sglang_harli.service.rows.encoder import RowEncoder, unused_fields
from sglang_harli.service.rows.error import RowError
from sglang_harli.service.rows.notes import ANSWERS_APART, Note
from sglang_harli.service.rows.row import Reading, Row, over_limit

logger = logging.getLogger(__name__)

MAX_REPORTED = 1000  # lines at fault in one report's details
MAX_REASON = 2000  # characters of one reason: it may quote a value of any length
SHOWN = 10  # reasons in its message
MAX_NAMED = 20  # fields that are named as ignored, or as repeated


class DataSummary(Struct, kw_only=True):
    """What a data file holds.  Tokens are counted after truncating and dropping."""

    file: str
    lines: int = 0  # lines that are not blank
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest_row: int = 0
    longest_line: int = 0  # the line of the longest row
    truncated: int = 0
    dropped: int = 0
    cut_conversations: int = 0  # conversations that became one row per answer
    largest_id: int = 0
    max_seq_length: int | None = None
    ignored_fields: list[str] = []
    tokenizer: str = ""  # fingerprint
    repeated_fields: list[str] = []  # that stand twice in their object; the last one counts
    notes: list[Note] = []
    validation_rows: int = 0  # of ``rows`` those that are held out of training, by validation_split
    validation: dict[str, Any] | None = None  # of a validation file the same, with bytes and sha256

    def text(self) -> str:
        parts = [f"{self.rows} rows, {self.tokens} tokens of which {self.target_tokens} are learned"]
        if self.validation_rows:
            parts.append(f"{self.validation_rows} of the rows are evaluated, not trained")
        if self.validation:
            file, rows = self.validation["file"], self.validation["rows"]
            parts.append(
                f"evaluated: {file}, {rows} rows, {self.validation['target_tokens']} tokens that count"
            )
        if self.truncated:
            parts.append(f"{self.truncated} rows truncated to {self.max_seq_length} tokens")
        if self.dropped:
            parts.append(f"{self.dropped} rows over {self.max_seq_length} tokens dropped")
        if self.cut_conversations:
            known = any(note.code == ANSWERS_APART for note in self.notes)
            why = "" if known else ", because the chat template renders earlier answers differently"
            parts.append(f"{self.cut_conversations} conversations became one row per answer{why}")
        if self.ignored_fields:
            parts.append(f"fields ignored: {', '.join(self.ignored_fields)}")
        if self.repeated_fields:
            parts.append(f"there twice, the last one counts: {', '.join(self.repeated_fields)}")
        parts += [note.text for note in self.notes]
        return "; ".join(parts)

    def builtins(self) -> dict[str, Any]:
        return to_builtins(self)


def scan(
    path: Path,
    tokenizer: RowEncoder,
    *,
    name: str,
    max_length: int | None = None,
    on_overflow: str = "error",
    writer: TokenWriter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> DataSummary:
    """Check every line of a JSONL file and, with a ``writer``, store its rows.

    ``name``: the file in messages; ``max_length``: longest row in tokens; ``on_overflow``:
    ``error``, ``truncate`` or ``drop`` for longer ones; ``stop``: asked at every line and answer,
    true ends the scan with NotReadyError.  Raises DataError: lines that are not accepted
    (``details``: line, field, reason of each), no row at all, or a file that is not JSONL.
    """
    summary, error = look(
        path, tokenizer, name=name, max_length=max_length, on_overflow=on_overflow, writer=writer, stop=stop
    )
    if error is not None:
        raise error
    return summary


def look(
    path: Path,
    tokenizer: RowEncoder,
    *,
    name: str,
    max_length: int | None = None,
    on_overflow: str = "error",
    writer: TokenWriter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[DataSummary, DataError | None]:
    """As ``scan``, with the figures of the rows that are accepted also where others are not."""
    summary = DataSummary(file=name, max_seq_length=max_length, tokenizer=tokenizer.fingerprint)
    report = _Report(name)
    repeated: list[str] = summary.repeated_fields
    about = file_format.look_at(path)
    if about.refusal is not None:
        return summary, DataError(f"{name}: {about.refusal}", param="data")
    reader = RowReader(about.coding)

    def go_on() -> None:
        if stop():
            raise NotReadyError("the service is stopping: submit again in a moment", code=BUSY)

    reading = Reading(limit=max_length if on_overflow == "error" else None, stop=go_on)
    lines = _LineRows(name, reader, tokenizer, reading)
    for line in read_lines(path, about.coding):
        go_on()
        summary.lines += 1
        reading.notes.line = line.number
        try:
            rows = 0
            for row in lines.rows(line):
                _take(_fit(row, max_length, on_overflow, summary), line.number, summary, writer)
                rows += 1
            repeated += [f"{field} (line {line.number})" for field in reader.twice]
            del repeated[MAX_NAMED:]
            summary.cut_conversations += rows > 1
        except RowError as error:
            report.add(line.number, error)
    summary.ignored_fields = sorted(map(_named, lines.ignored))[:MAX_NAMED]
    summary.notes = reading.notes.notes()
    return summary, report.error(summary)


class _LineRows:
    """The rows of each line of one file; ``ignored``: fields that were passed over."""

    def __init__(self, name: str, reader: RowReader, tokenizer: RowEncoder, reading: Reading) -> None:
        self._name = name
        self._reader = reader
        self._tokenizer = tokenizer
        self._reading = reading
        self._surprised = False
        self.ignored: set[str] = set()

    def rows(self, line: Line) -> Iterator[Row]:
        """Raises RowError; trouble of the environment and the end of the scan pass through."""
        try:
            record = self._reader.read(line)
            foreign.check(record)
            yield from self._tokenizer.each_row(record, self._reading)
            if len(self.ignored) < MAX_REPORTED:
                self.ignored |= unused_fields(record)
        except (RowError, HarliError, OSError, MemoryError, ImportError):
            raise
        except Exception as error:  # boundary: one line is refused; the report names the others too
            if not self._surprised:  # once: a file may have millions of such lines
                logger.warning("%s: line %d cannot be made a row", self._name, line.number, exc_info=True)
                self._surprised = True
            raise RowError(f"it cannot be made a row ({type(error).__name__}: {error})") from error


def _named(field: str) -> str:
    """A field's name as it is stored and shown: data may have names of any length or no text."""
    name = field.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= 64 else name[:64] + "..."


def _fit(row: Row, max_length: int | None, on_overflow: str, summary: DataSummary) -> Row | None:
    """The row within the limit, None if it is dropped."""
    if max_length is None or len(row.ids) <= max_length:
        if not row.target_tokens:
            raise RowError("there is no token to learn: the prompt is empty and the answer has one token")
        return row
    if on_overflow == "drop":
        summary.dropped += 1
        return None
    if on_overflow == "error":
        raise over_limit(len(row.ids), max_length)
    short = row.cut(max_length)
    if not short.target_tokens:
        raise RowError(
            f"truncated to {max_length} tokens nothing is left to learn (the prompt alone is longer): shorten "
            "the prompt, or submit with on_overflow=drop"
        )
    summary.truncated += 1
    return short


def _take(row: Row | None, number: int, summary: DataSummary, writer: TokenWriter | None) -> None:
    if row is None:
        return
    summary.rows += 1
    summary.tokens += len(row.ids)
    summary.target_tokens += row.target_tokens
    summary.largest_id = max(summary.largest_id, *row.ids)
    if len(row.ids) > summary.longest_row:
        summary.longest_row, summary.longest_line = len(row.ids), number
    if writer is not None:
        writer.append(row, number)


class _Report:
    """Collects the lines at fault."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._details: list[dict[str, Any]] = []

    def add(self, line: int, error: RowError) -> None:
        self._count += 1
        if len(self._details) < MAX_REPORTED:
            reason = error.reason if len(error.reason) <= MAX_REASON else f"{error.reason[:MAX_REASON]}..."
            reason = reason.encode("utf-8", "backslashreplace").decode()  # it may quote what is no text
            self._details.append({"line": line, "field": error.field, "reason": reason})

    def error(self, summary: DataSummary) -> DataError | None:
        if self._count:
            groups = list(grouped(self._details))[:SHOWN]
            shown = "; ".join(f"{lines}: {reason}" for lines, reason, _ in groups)
            left = self._count - sum(count for *_, count in groups)
            return DataError(
                f"{self._name}: {self._count} of {summary.lines} lines not accepted: {shown}"
                f"{f'; and {left} more' if left else ''}",
                param="data",
                details=self._details,
            )
        if not summary.rows:
            why = (
                "every row is over the limit and was dropped"
                if summary.dropped
                else "it holds no line of data"
            )
            return DataError(f"{self._name}: nothing to train on: {why}", param="data")
        return None

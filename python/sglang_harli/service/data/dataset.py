"""From a streamed training file to token rows, or to one report of all that is not accepted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from sglang_harli.errors import DataError, HarliError, NotReadyError, grouped
from sglang_harli.protocol.public import BUSY
from sglang_harli.protocol.rows import forms
from sglang_harli.service.data.files import file_format, source
from sglang_harli.service.data.files.record import Record
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.rows.encoder import READ_AS, RowEncoder, unused_fields
from sglang_harli.service.rows.error import FileFault, RowError
from sglang_harli.service.rows.forms import foreign
from sglang_harli.service.rows.notes import ANSWERS_APART, Note, RowNotes
from sglang_harli.service.rows.row import Reading, Row, over_limit

logger = logging.getLogger(__name__)

MAX_REPORTED = 1000  # rows at fault in one report's details
MAX_REASON = 2000  # characters of one reason: it may quote a value of any length
SHOWN = 10  # reasons in its message
MAX_NAMED = 20  # fields that are named as ignored, or as repeated


class DataSummary(Struct, kw_only=True):
    """What a data file holds.  Tokens are counted after truncating and dropping."""

    file: str
    format: str = ""  # of its rows: messages, prompt_completion, alpaca or sharegpt
    file_format: str = ""  # jsonl, json (an array), csv or parquet
    file_text: str = ""  # that in words, with its encoding and packing
    unit: str = "line"  # what ``longest_line`` and the numbers in messages count: line or row
    lines: int = 0  # lines that are not blank, or rows
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest_row: int = 0
    longest_line: int = 0  # the line, or the number, of the longest row
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
        if self.format:  # a job of a version before has none
            how = f" ({READ_AS[self.format]})" if self.format in READ_AS else ""
            parts.append(f"format: {self.format}{how} in {self.file_text}")
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


class RefusedDataError(DataError):
    """The refusal of a file: how many of its rows are at fault, and the sentence that is about all
    of it, where there is one."""

    bad_rows: int = 0
    fault: str | None = None


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
    """Check every row of a training file and, with a ``writer``, store its rows.

    ``name``: the file in messages; ``max_length``: longest row in tokens; ``on_overflow``:
    ``error``, ``truncate`` or ``drop`` for longer ones; ``stop``: asked at every row and answer,
    true ends the scan with NotReadyError.  Raises DataError: rows that are not accepted
    (``details``: line or row, field, reason of each), no row at all, rows of two formats, or a file
    that is not read; OSError.
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
) -> tuple[DataSummary, RefusedDataError | None]:
    """As ``scan``, with the figures of the rows that are accepted also where others are not."""
    summary = DataSummary(file=name, max_seq_length=max_length, tokenizer=tokenizer.fingerprint)
    report = _Report(name)

    def go_on() -> None:
        if stop():
            raise NotReadyError("the service is stopping: submit again in a moment", code=BUSY)

    try:
        about = file_format.look_at(path)
        summary.file_format, summary.file_text, summary.unit = about.kind, about.shown, about.unit
        reading = Reading(
            RowNotes(about.unit), limit=max_length if on_overflow == "error" else None, stop=go_on
        )
        rows = _Rows(summary, tokenizer, reading)
        with contextlib.closing(source.records(about)) as records, rows.summed_up():
            for record in records:
                go_on()
                summary.lines += 1
                try:
                    _take(rows.of(record), record, on_overflow, summary, writer)
                except RowError as error:
                    report.add(about.unit, record, error)
    except FileFault as fault:
        report.fault = fault.reason
    return summary, report.error(summary)


class _Rows:
    """The rows of each record of one file; ``ignored``: fields that were passed over."""

    def __init__(self, summary: DataSummary, tokenizer: RowEncoder, reading: Reading) -> None:
        self._summary = summary
        self._tokenizer = tokenizer
        self._reading = reading
        self._surprised = False
        self._first = 0  # the record that the file's form was seen from
        self.ignored: set[str] = set()

    @contextlib.contextmanager
    def summed_up(self) -> Iterator[None]:
        """Puts what was noticed into the summary, where the reading ends early too."""
        try:
            yield
        finally:
            self._summary.ignored_fields = sorted(map(_named, self.ignored))[:MAX_NAMED]
            self._summary.notes = self._reading.notes.notes()

    def of(self, record: Record) -> Iterator[Row]:
        """Raises RowError, FileFault; trouble of the environment and the end of the scan pass
        through."""
        self._reading.notes.line = record.number
        try:
            if record.error is not None:
                raise record.error
            foreign.check(record.value)
            self._check_form(record)
            yield from self._tokenizer.each_row(record.value, self._reading)
            if record.left_out:
                self._reading.notes.add("nulls_left_out")
            if len(self.ignored) < MAX_REPORTED:
                self.ignored |= unused_fields(record.value, self._reading.form)
        except (RowError, FileFault, HarliError, OSError, MemoryError, ImportError):
            raise
        except Exception as error:  # boundary: one row is refused; the report names the others too
            if not self._surprised:  # once: a file may have millions of such rows
                at = self._summary.unit, record.number
                logger.warning("%s: %s %d cannot be made a row", self._summary.file, *at, exc_info=True)
                self._surprised = True
            raise RowError(f"it cannot be made a row ({type(error).__name__}: {error})") from error

    def _check_form(self, record: Record) -> None:
        """All rows of a file have one form: that of the first row that has one."""
        form = forms.form_of(record.value)
        if form is None:
            return
        if self._reading.form is None:
            self._reading.form = self._summary.format = form
            self._first = record.number
        elif form != self._reading.form:
            unit = self._summary.unit
            raise FileFault(
                f"it mixes formats: {unit} {record.number} has the format {form}, {unit} {self._first} has "
                f"{self._reading.form}; put rows of one format into one file"
            )


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


def _take(
    rows: Iterator[Row], record: Record, on_overflow: str, summary: DataSummary, writer: TokenWriter | None
) -> None:
    """Count and store the rows of a record."""
    count = 0
    for made in rows:
        count += 1
        row = _fit(made, summary.max_seq_length, on_overflow, summary)
        if row is None:
            continue
        summary.rows += 1
        summary.tokens += len(row.ids)
        summary.target_tokens += row.target_tokens
        summary.largest_id = max(summary.largest_id, *row.ids)
        if len(row.ids) > summary.longest_row:
            summary.longest_row, summary.longest_line = len(row.ids), record.number
        if writer is not None:
            writer.append(row, record.number)
    summary.repeated_fields += [f"{field} ({summary.unit} {record.number})" for field in record.twice]
    del summary.repeated_fields[MAX_NAMED:]
    summary.cut_conversations += count > 1


class _Report:
    """Collects the rows at fault; ``fault``: why the file is not accepted as a whole."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._details: list[dict[str, Any]] = []
        self.fault: str | None = None

    def add(self, unit: str, record: Record, error: RowError) -> None:
        self._count += 1
        if len(self._details) < MAX_REPORTED:
            reason = error.reason if len(error.reason) <= MAX_REASON else f"{error.reason[:MAX_REASON]}..."
            reason = reason.encode("utf-8", "backslashreplace").decode()  # it may quote what is no text
            place = {unit: record.number} | ({} if record.line is None else {"line": record.line})
            self._details.append(place | {"field": error.field, "reason": reason})

    def error(self, summary: DataSummary) -> RefusedDataError | None:
        made = self._error(summary)
        if made is not None:
            made.bad_rows = self._count
            made.fault = self.fault or self._common(summary)
        return made

    def _common(self, summary: DataSummary) -> str | None:
        """The reason of all rows, where none is accepted and all reported ones have one reason."""
        found = {row["reason"] for row in self._details}
        return found.pop() if self._count > 1 and self._count == summary.lines and len(found) == 1 else None

    def _error(self, summary: DataSummary) -> RefusedDataError | None:
        if self.fault is not None:
            self.fault = self.fault.encode("utf-8", "backslashreplace").decode()
            return RefusedDataError(f"{self._name}: {self.fault}", param="data", details=self._details)
        if self._count:
            groups = list(grouped(self._details))[:SHOWN]
            shown = "; ".join(f"{lines}: {reason}" for lines, reason, _ in groups)
            left = self._count - sum(count for *_, count in groups)
            return RefusedDataError(
                f"{self._name}: {self._count} of {summary.lines} {summary.unit}s not accepted: {shown}"
                f"{f'; and {left} more' if left else ''}",
                param="data",
                details=self._details,
            )
        if not summary.rows:
            why = (
                "every row is over the limit and was dropped"
                if summary.dropped
                else f"it holds no {'line of data' if summary.unit == 'line' else 'row'}"
            )
            self.fault = f"nothing to train on: {why}"
            return RefusedDataError(f"{self._name}: {self.fault}", param="data")
        return None

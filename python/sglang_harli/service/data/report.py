"""What to see of a data file before it makes a job: lengths, what is learned, bad lines, notes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from msgspec import to_builtins

from sglang_harli.service.data.dataset import look
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.rows.row import Row
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer

EXAMPLES = 3
EXAMPLE_TOKENS = 2048  # of one example at most
BUCKETS = 12


def data_report(
    path: Path,
    tokenizer: RowEncoder,
    *,
    name: str,
    max_length: int | None,
    on_overflow: str,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Read a file as a submit does; raises OSError.

    Of the file: ``format`` of its rows, ``file_format``, ``file_text`` (that in words) and ``unit``
    (what numbers count: line or row).  Lists in the result: ``notes`` (code, text, names, line),
    ``bad_lines`` (line or row, field, reason; the first of ``bad_rows``), ``histogram`` (from, to,
    rows; lengths in tokens, ends included) and ``examples`` (line or row, parts; each part: text,
    learned).  ``summary``, ``message`` (the trouble) and ``fault`` (what is about the file as a
    whole) may be None.
    """
    seen = _Collector()
    summary, error = look(
        path,
        tokenizer,
        name=name,
        max_length=max_length,
        on_overflow=on_overflow,
        writer=cast(TokenWriter, seen),
        stop=stop,
    )
    return seen.report(tokenizer.served, summary.unit) | {
        "ok": error is None,
        "file": name,
        "format": summary.format or None,
        "file_format": summary.file_format or None,
        "file_text": summary.file_text or None,
        "unit": summary.unit,
        "truncated": summary.truncated,
        "dropped": summary.dropped,
        "summary": summary.text() if summary.rows else None,
        "notes": to_builtins(summary.notes),
        "max_seq_length": max_length,
        "bad_rows": error.bad_rows if error else 0,
        "bad_lines": error.details if error else [],
        "fault": error.fault if error else None,
        "message": error.message if error else None,
    }


class _Collector:
    """Takes the place of TokenWriter."""

    def __init__(self) -> None:
        self.lengths = array("I")
        self.targets = 0
        self.examples: list[tuple[int, Row]] = []

    def append(self, row: Row, line: int) -> None:
        self.lengths.append(len(row.ids))
        self.targets += row.target_tokens
        if len(self.examples) < EXAMPLES:
            self.examples.append((line, row.cut(EXAMPLE_TOKENS)))

    def report(self, tokenizer: ServedTokenizer, unit: str) -> dict[str, Any]:
        tokens = sum(self.lengths)
        return {
            "rows": len(self.lengths),
            "tokens": tokens,
            "target_tokens": self.targets,
            "loss_share": round(self.targets / tokens, 4) if tokens else 0.0,
            "longest_row": max(self.lengths, default=0),
            "histogram": histogram(self.lengths),
            "examples": [{unit: number, "parts": parts(row, tokenizer)} for number, row in self.examples],
        }


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Up to ``BUCKETS`` equal ranges of lengths and the number of rows in each."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BUCKETS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        {"from": low + i * width, "to": min(high, low + (i + 1) * width - 1), "rows": n}
        for i, n in enumerate(counts)
    ]


def parts(row: Row, tokenizer: ServedTokenizer) -> list[dict[str, Any]]:
    """The row's text in runs of equal mask."""
    runs = groupby(zip(row.targets, row.ids, strict=True), key=itemgetter(0))
    return [{"text": tokenizer.decode([i for _, i in run]), "learned": learned} for learned, run in runs]

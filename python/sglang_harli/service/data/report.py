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

    Lists in the result: ``notes`` (code, text, names, line), ``bad_lines`` (line, field, reason),
    ``histogram`` (from, to, rows; lengths in tokens, ends included) and ``examples`` (line, parts;
    each part: text, learned).  ``summary`` and ``message`` (the first trouble) may be None.
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
    return seen.report(tokenizer.served) | {
        "ok": error is None,
        "file": name,
        "truncated": summary.truncated,
        "dropped": summary.dropped,
        "summary": summary.text() if summary.rows else None,
        "notes": to_builtins(summary.notes),
        "max_seq_length": max_length,
        "bad_lines": error.details if error else [],
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

    def report(self, tokenizer: ServedTokenizer) -> dict[str, Any]:
        tokens = sum(self.lengths)
        return {
            "rows": len(self.lengths),
            "tokens": tokens,
            "target_tokens": self.targets,
            "loss_share": round(self.targets / tokens, 4) if tokens else 0.0,
            "longest_row": max(self.lengths, default=0),
            "histogram": histogram(self.lengths),
            "examples": [{"line": line, "parts": parts(row, tokenizer)} for line, row in self.examples],
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

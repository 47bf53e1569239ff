"""Look at a data file the way the service will: rows, bad lines, lengths, what is learned (``harli check-data``).

Uses the service's own code, so what passes here passes there (the served limits on rank and memory aside).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from sglang_harli.errors import ConfigError, DataError
from sglang_harli.protocol.data_source import as_text, open_file
from sglang_harli.protocol.public import OVERFLOWS
from sglang_harli.service import admission, hidden_torch
from sglang_harli.service.chat_rows import Row, RowTokenizer
from sglang_harli.service.dataset import look
from sglang_harli.service.token_store import TokenWriter

EXAMPLES = 3
BUCKETS = 12


class _Collector:
    """Stands where the service's writer of rows stands."""

    def __init__(self) -> None:
        self.lengths = array("I")
        self.targets = 0
        self.examples: list[tuple[int, Row]] = []

    def append(self, row: Row, line: int) -> None:
        self.lengths.append(len(row.ids))
        self.targets += row.target_tokens
        if len(self.examples) < EXAMPLES:
            self.examples.append((line, row))

    def report(self, tokenizer: Any) -> dict[str, Any]:
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


def check_data(
    data: str | Path,
    model: str,
    *,
    max_seq_length: int | None = None,
    on_overflow: str = "error",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Validate a JSONL file against a model's tokenizer and chat template.

    Hides torch from this process, as the service does: call it from a process of its own.

    Args:
        data: the file.
        model: folder or hub id of the model that will be served, or of its tokenizer.
        max_seq_length: longest row in tokens; default: the model's limit.

    Returns:
        ``ok, file, rows, tokens, target_tokens, loss_share, longest_row, truncated, dropped, notes,
        max_seq_length, bad_lines`` (each: line, field, reason), ``message`` (of the first trouble, or None),
        ``histogram`` (each: from, to, rows; lengths in tokens, ends included) and ``examples`` (each: line,
        parts; each part: text, learned).

    Raises:
        ConfigError: the model's tokenizer cannot be loaded, or an option is not accepted.
        DataError: the file cannot be read.
    """
    path = Path(data)
    open_file(path).close()
    name = as_text(path.name)
    limit = _limit(model, max_seq_length, on_overflow)
    tokenizer = _load(model, trust_remote_code)
    seen = _Collector()
    try:
        summary, error = look(
            path,
            RowTokenizer(tokenizer),
            name=name,
            max_length=limit,
            on_overflow=on_overflow,
            writer=cast(TokenWriter, seen),
        )
    except OSError as trouble:
        raise DataError(
            f"{name} cannot be read: {trouble.strerror or trouble}", code="unreadable_file", param="data"
        ) from trouble
    return seen.report(tokenizer) | {
        "ok": error is None,
        "file": as_text(str(path)),
        "truncated": summary.truncated,
        "dropped": summary.dropped,
        "notes": summary.text() if summary.rows else None,
        "max_seq_length": limit,
        "bad_lines": error.details if error else [],
        "message": error.message if error else None,
    }


def _limit(model: str, max_seq_length: int | None, on_overflow: str) -> int | None:
    """The longest row that is accepted, None where the model's own files do not say."""
    if on_overflow not in OVERFLOWS:
        raise ConfigError(
            f"on_overflow={on_overflow!r} is not accepted: give one of {', '.join(OVERFLOWS)}",
            param="on_overflow",
        )
    limit = admission.model_length(model)
    if max_seq_length is not None and not 2 <= max_seq_length <= (limit or max_seq_length):
        raise ConfigError(
            f"max_seq_length={max_seq_length} is not accepted: give at least 2"
            + (f" and at most the model's limit, {limit} tokens" if limit else ""),
            param="max_seq_length",
        )
    return max_seq_length or limit


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


def parts(row: Row, tokenizer: Any) -> list[dict[str, Any]]:
    """The row's text in runs of equal mask."""
    found: list[dict[str, Any]] = []
    start = 0
    for at in range(1, len(row.ids) + 1):
        if at == len(row.ids) or row.targets[at] != row.targets[start]:
            text = tokenizer.decode(row.ids[start:at], skip_special_tokens=False)
            found.append({"text": text, "learned": row.targets[start]})
            start = at
    return found


def _load(model: str, trust_remote_code: bool) -> Any:
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise ConfigError(
            f"{model}: no such folder: give the folder or hub id of the served model", param="model"
        )
    hidden_torch.hide()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"no tokenizer can be loaded from {model!r} ({reason}): give the folder or hub id of the served model",
            param="model",
        ) from error

"""What rows of tables (CSV, Parquet) have in common: columns with names, lists as JSON texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang_harli.protocol.rows import forms
from sglang_harli.service.data.files.row_json import RowReader
from sglang_harli.service.rows.error import FileFault, RowError
from sglang_harli.service.rows.forms import foreign

SHOWN = 10  # names of columns in a message


def check_columns(columns: Sequence[str]) -> None:
    """Raise FileFault unless rows of these columns can have an accepted form."""
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise FileFault(f"column {twice[0]!r} stands in its header twice: rename one of them")
    if forms.form_of_columns(columns) is not None:
        return
    found = ", ".join(repr(name[:64]) for name in columns[:SHOWN]) or "none"
    try:
        foreign.check(dict.fromkeys(columns, ""))
    except RowError as error:
        raise FileFault(f"its columns are {found}: {error.reason}") from error
    raise FileFault(f"its columns are {found}; accepted: {forms.ACCEPTED}")


def complete(row: dict[str, Any], reader: RowReader) -> dict[str, Any]:
    """The row with its lists read from their JSON texts; an empty text is none; raises RowError."""
    for name in forms.LISTS:
        text = row.get(name)
        if isinstance(text, str):
            row[name] = reader.cell(text, name) if text.strip() else None
    return row

"""A row of a training file as it was found, before it becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_harli.service.rows.error import RowError


@dataclass(frozen=True, slots=True)
class Record:
    """A row's value, or why there is none.

    Attributes:
        number: from 1, of its line (JSONL) or of the row.
        line: on which a row that is no line begins; None: not known, or ``number`` is it.
        twice: fields that stand twice in its objects.
        left_out: whether nulls were left out that a table's columns put into its objects.
    """

    number: int
    line: int | None = None
    value: Any = None
    error: RowError | None = None
    twice: Sequence[str] = ()
    left_out: bool = False

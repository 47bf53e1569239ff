"""A row of training data, and how the rows of a file are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_harli.service.rows.error import RowError
from sglang_harli.service.rows.notes import RowNotes
from sglang_harli.service.rows.served_tokenizer import ServedTokenizer


@dataclass(frozen=True, slots=True)
class Row:
    """``targets[i]``: whether token ``ids[i]`` is learned (at its own position, not shifted)."""

    ids: list[int]
    targets: list[bool]

    @property
    def target_tokens(self) -> int:
        """Targets that count: nothing predicts the first token."""
        return sum(self.targets[1:])

    def cut(self, length: int) -> Row:
        return Row(self.ids[:length], self.targets[:length])


def over_limit(tokens: int, limit: int, *, at_least: bool = False) -> RowError:
    """The refusal of a row that is longer than ``max_seq_length``."""
    return RowError(
        f"{'at least ' if at_least else ''}{tokens} tokens, the limit is {limit} (max_seq_length): shorten it, or "
        "submit with on_overflow=truncate or on_overflow=drop"
    )


@dataclass(slots=True)
class Reading:
    """How a file's rows are read."""

    notes: RowNotes = field(default_factory=RowNotes)
    limit: int | None = None  # a longer row (in tokens) is refused at once
    form: str | None = None  # of the file's rows, once it is known
    stop: Callable[[], None] = lambda: None  # asked before each answer; may raise


def end_of_text(served: ServedTokenizer) -> int:
    """The token at which serving ends any answer."""
    if served.eos_id is None:
        raise RowError("the tokenizer has no end-of-text token, so an answer could never end")
    return served.eos_id

"""Which rows are evaluated: never trained, the same over the whole run, all of them at the end."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.errors import DataError
from sglang_harli.protocol.internal import BatchCursor
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.data.batches import Batch, BatchOrder
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.data.validation import hold_out
from sglang_harli.service.rows.row import Row


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """``tokens(rows, per_line)``: so many rows of a line, whose ids tell which row they are."""
    made: dict[tuple[int, int], Path] = {}

    def get(rows: int, per_line: int = 1) -> TokenReader:
        if (rows, per_line) not in made:
            folder = made[rows, per_line] = tmp_path_factory.mktemp("tokens")
            with TokenWriter(folder) as writer:
                for n in range(rows):
                    length = 2 + n % 5
                    writer.append(Row([n] * length, [False] + [True] * (length - 1)), n // per_line + 1)
        return TokenReader(made[rows, per_line])

    return get


def walk(order: BatchOrder) -> list[Batch]:
    found, cursor = [], order.cursor_after(0)
    while cursor.step <= order.total_steps:
        found.append(order.batch(cursor))
        cursor = order.following(cursor)
    return found


def rows_of(batches: list[Batch]) -> list[int]:
    return [int(n) for batch in batches for n in batch.data.ids[:, 0]]


def evaluations(batches: list[Batch]) -> dict[int, list[Batch]]:
    found: dict[int, list[Batch]] = {}
    for batch in batches:
        if batch.cursor.index >= batch.micro_batches:
            found.setdefault(batch.cursor.step, []).append(batch)
    return found


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(4, 23),
    per_line=st.integers(1, 2),
    split=st.floats(0.01, 0.5),
    size=st.integers(1, 5),
    every=st.integers(0, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_is_disjoint_and_stable(tokens, rows, per_line, split, size, every, seed):
    hp = Hyperparameters(n_epochs=2, batch_size=size, validation_split=split, eval_steps=every, seed=seed)
    batches = walk(BatchOrder(tokens(rows, per_line), hp))
    found = evaluations(batches)
    trained = rows_of([b for b in batches if b.cursor.index < b.micro_batches])
    [evaluated, *others] = [set(rows_of(group)) for group in found.values()]
    assert all(other == evaluated for other in others)
    assert set(trained).isdisjoint(evaluated) and set(trained) | evaluated == set(range(rows))
    lines = {row // per_line for row in evaluated}
    assert lines.isdisjoint(row // per_line for row in trained), "a conversation is in both parts"
    assert len(lines) == max(1, round(split * ceil(rows / per_line)))
    last = batches[-1].cursor.step
    due = {step for step in range(1, last + 1) if step == last or (every and step % every == 0)}
    assert set(found) == due
    for step, group in found.items():
        behind = group[0].evaluation
        assert behind is not None and behind.whole and behind.count == behind.sampled == len(group)
        assert BatchOrder(tokens(rows, per_line), hp).evaluation_of(step) == group[0].cursor
        assert sum(b.step_target_tokens for b in group) == sum(len(b.data.targets) for b in group)


def test_a_file_of_its_own_leaves_the_order_of_training(tokens):
    hp = Hyperparameters(n_epochs=2, batch_size=3, eval_steps=2)
    plain = walk(BatchOrder(tokens(11), hp))
    both = walk(BatchOrder(tokens(11), hp, tokens(7, 2)))
    training = [b for b in both if b.cursor.index < b.micro_batches]
    assert [b.cursor for b in training] == [b.cursor for b in plain]
    assert rows_of(training) == rows_of(plain)
    assert all(sorted(rows_of(group)) == list(range(7)) for group in evaluations(both).values())


def test_a_sample_is_the_same_each_time_and_comes_first_at_the_end(tokens):
    hp = Hyperparameters(n_epochs=3, batch_size=2, eval_steps=2, eval_rows=3)
    found = evaluations(walk(BatchOrder(tokens(8), hp, tokens(9))))
    *early, last = [set(rows_of(group[:2])) for group in found.values()]
    assert len(last) == 3 and all(sample == last for sample in early)
    assert [group[0].evaluation.whole for group in found.values()] == [False] * len(early) + [True]
    *_, whole = found.values()
    assert sorted(rows_of(whole)) == list(range(9)) and whole[0].evaluation.sampled == 2
    assert {group[0].evaluation.count for group in found.values()} == {2, 5}


def test_no_evaluation_without_rows(tokens):
    order = BatchOrder(tokens(5), Hyperparameters(batch_size=2))
    assert order.evaluation_of(order.total_steps) is None
    assert all(batch.evaluation is None for batch in walk(order))
    assert order.cursor_after(0) == BatchCursor(epoch=1, step=1, index=0)


def test_one_line_cannot_be_in_both_parts(tmp_path):
    with TokenWriter(tmp_path) as writer:
        for _ in range(3):
            writer.append(Row([1, 2], [False, True]), 1)
    with pytest.raises(DataError, match=r"f.jsonl: validation_split=0.1 needs at least 2 lines"):
        hold_out(tmp_path, Hyperparameters(validation_split=0.1), DataSummary(file="f.jsonl"))
    assert np.load(tmp_path / "rows.npz")["lines"].tolist() == [1, 1, 1]

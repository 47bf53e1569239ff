"""The order of rows over a run: every row once an epoch, from any cursor the same, at no memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.protocol.internal import BatchCursor
from sglang_harli.protocol.micro_batches import pad
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.service.data.batches import Batch, BatchOrder, total_steps
from sglang_harli.service.data.token_store import TokenReader, TokenWriter
from sglang_harli.service.rows.encoder import Row


def test_a_service_without_descriptors_left_has_all_that_feeding_needs():
    code = "import sys, sglang_harli.service.app; sys.exit('numpy.random' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """``tokens(rows)``: rows of rising lengths whose ids tell which row they are."""
    made: dict[int, TokenReader] = {}

    def get(rows: int) -> TokenReader:
        if rows not in made:
            folder = tmp_path_factory.mktemp("tokens")
            with TokenWriter(folder) as writer:
                for n in range(rows):
                    length = 2 + n % 5
                    writer.append(Row([n] * length, [False] + [True] * (length - 1)), n + 1)
            made[rows] = TokenReader(folder)
        return made[rows]

    return get


def walk(feeder: BatchOrder, start: BatchCursor | None = None):
    cursor = start or feeder.cursor_after(0)
    while cursor.step <= feeder.total_steps:
        yield feeder.batch(cursor)
        cursor = feeder.following(cursor)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 23),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_once_an_epoch(tokens, rows, batch_size, accumulation, epochs, seed):
    hp = Hyperparameters(
        n_epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation, seed=seed
    )
    feeder = BatchOrder(tokens(rows), hp)
    batches = list(walk(feeder))
    assert (
        feeder.total_steps == epochs * ceil(ceil(rows / batch_size) / accumulation) == total_steps(rows, hp)
    )
    assert {b.cursor.step for b in batches} == set(range(1, feeder.total_steps + 1))
    for epoch, group in itertools.groupby(batches, key=lambda b: b.cursor.epoch):
        seen = [int(n) for b in group for n in b.data.ids[:, 0]]
        assert sorted(seen) == list(range(rows)), epoch
    for _, group in itertools.groupby(batches, key=lambda b: b.cursor.step):
        step = list(group)
        assert [b.cursor.index for b in step] == list(range(step[0].micro_batches))
        rows = [r for b in step for r in sorted(b.data.positions)]
        assert rows == list(range(sum(len(b.data.lengths) for b in step)))
        assert sum(len(b.data.targets) for b in step) == step[0].step_target_tokens


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_run_goes_on_from_any_cursor(tokens, data):
    hp = Hyperparameters(n_epochs=3, batch_size=2, gradient_accumulation_steps=3)
    whole = list(walk(BatchOrder(tokens(17), hp)))
    at = data.draw(st.integers(0, len(whole) - 1))
    rest = list(walk(BatchOrder(tokens(17), hp), whole[at].cursor))

    def shown(batches: list[Batch]) -> list[tuple[object, ...]]:
        return [(b.cursor, b.data.positions, *(a.tolist() for a in b.data.arrays)) for b in batches]

    assert shown(rest) == shown(whole[at:])


def test_epochs_and_seeds_differ(tokens):
    def order(seed: int, epoch: int) -> list[int]:
        feeder = BatchOrder(tokens(23), Hyperparameters(batch_size=23, seed=seed))
        data = feeder.batch(feeder.cursor_after(epoch - 1)).data
        return [int(n) for _, n in sorted(zip(data.positions, data.ids[:, 0], strict=True))]

    assert order(1, 1) != order(1, 2) != order(2, 2)
    assert order(1, 1) == order(1, 1)


def test_a_long_schedule_costs_no_memory(tokens):
    tracemalloc.start()
    feeder = BatchOrder(tokens(23), Hyperparameters(n_epochs=10_000, batch_size=1))
    assert feeder.total_steps == 230_000
    last = feeder.batch(feeder.cursor_after(229_999))
    assert last.cursor == BatchCursor(epoch=10_000, step=230_000, index=0)
    assert feeder.following(last.cursor).step == 230_001
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_arrays_are_what_the_protocol_says(tokens):
    feeder = BatchOrder(tokens(5), Hyperparameters(batch_size=3))
    batch = feeder.batch(feeder.cursor_after(0))
    data = batch.data
    assert {array.dtype for array in data.arrays} == {np.dtype(np.int32)}
    assert data.ids.shape == (3, max(data.lengths)) and data.lengths == sorted(data.lengths, reverse=True)
    assert len(data.places) == len(data.targets) == sum(data.lengths) - 3  # the first token of each is none
    assert data.nbytes == 4 * (data.ids.size + 2 * len(data.targets))


@given(
    rows=st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9), min_size=1),
)
def test_padded_rows_are_the_rows(rows):
    ids = np.array([n for row in rows for n, _ in row], dtype=np.int32)
    labels = np.array([n if learns else -100 for row in rows for n, learns in row], dtype=np.int32)
    data = pad([len(row) for row in rows], range(10, 10 + len(rows)), ids, labels)
    width = max(map(len, rows))
    wanted = []
    for place, (at, length) in enumerate(zip(data.positions, data.lengths, strict=True)):
        row = rows[at - 10]
        assert data.ids[place].tolist() == [n for n, _ in row] + [0] * (width - length)
        wanted += [(place * width + c - 1, n) for c, (n, learns) in enumerate(row) if c and learns]
    assert list(zip(data.places.tolist(), data.targets.tolist(), strict=True)) == wanted
    assert data.lengths == sorted(data.lengths, reverse=True)

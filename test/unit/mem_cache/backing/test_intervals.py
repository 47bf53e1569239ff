"""Places in the training window."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_harli.mem_cache.backing.intervals import IntervalAllocator

SIZE = 24


class WindowMachine(RuleBasedStateMachine):
    """First fit, against a list of taken units."""

    def __init__(self) -> None:
        super().__init__()
        self.window = IntervalAllocator(SIZE)
        self.taken = [False] * SIZE
        self.held: list[tuple[int, int]] = []

    @rule(length=st.integers(1, 10))
    def allocate(self, length: int) -> None:
        fits = [i for i in range(SIZE - length + 1) if not any(self.taken[i : i + length])]
        start = self.window.allocate(length)
        assert start == (fits[0] if fits else None)
        if start is not None:
            self.taken[start : start + length] = [True] * length
            self.held.append((start, length))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        start, length = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.window.release(start, length)
        self.taken[start : start + length] = [False] * length
        with pytest.raises(ValueError, match="free already"):
            self.window.release(start, length)

    @invariant()
    def agrees(self) -> None:
        assert self.window.free == self.taken.count(False)
        edges = self.window._free
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(edges)), "not joined"


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (23, 2), (3, 0)])
def test_what_lies_outside_is_refused(start, length):
    window = IntervalAllocator(SIZE)
    window.allocate(SIZE)
    with pytest.raises(ValueError, match="not an interval"):
        window.release(start, length)


def test_an_empty_window_and_an_empty_interval():
    assert IntervalAllocator(0).allocate(1) is None
    with pytest.raises(ValueError, match="at least one"):
        IntervalAllocator(SIZE).allocate(0)

"""What of the scheduler's loop counts as a step (CPU)."""

from __future__ import annotations

import pytest

from sglang_harli.managers.scheduler.step_timer import BatchLoad, HostTimer

DECODE = BatchLoad(True, 2, 40, 2, 40)
PREFILL = BatchLoad(False, 1, 12, 12, 144)


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def batch(
    timer: HostTimer, clock: Clock, load: BatchLoad, *, before: float, run: float, after: float
) -> None:
    """Receiving and batching, the forward, and handing out its tokens."""
    clock.s += before
    timer.begin()
    clock.s += run
    timer.end(load)
    clock.s += after


def test_the_loop_around_a_batch_counts_and_training_does_not(clock: Clock) -> None:
    timer = HostTimer(clock)
    batch(timer, clock, PREFILL, before=5.0, run=2.0, after=0.5)
    assert timer.take() == [(PREFILL, pytest.approx(2.5))]  # idle before: only what came behind
    clock.s += 30.0  # quanta
    timer.turn()
    batch(timer, clock, DECODE, before=0.25, run=1.0, after=0.5)
    assert timer.take() == [(DECODE, pytest.approx(1.75))]
    assert timer.take() == []


def test_an_idle_turn_is_no_part_of_the_next_step(clock: Clock) -> None:
    timer = HostTimer(clock)
    batch(timer, clock, DECODE, before=0.0, run=1.0, after=0.0)
    timer.take()
    timer.turn()
    clock.s += 50.0
    timer.drop()
    batch(timer, clock, DECODE, before=7.0, run=1.0, after=0.5)
    assert timer.take() == [(DECODE, pytest.approx(1.5))]


def test_overlapped_batches_are_one_turn_each(clock: Clock) -> None:
    timer = HostTimer(clock)
    batch(timer, clock, PREFILL, before=0.0, run=2.0, after=0.0)  # nothing to process yet
    batch(timer, clock, DECODE, before=0.5, run=1.0, after=0.25)
    assert timer.take() == [(PREFILL, pytest.approx(2.0)), (DECODE, pytest.approx(1.25))]
    timer.turn()
    batch(timer, clock, DECODE, before=0.5, run=1.0, after=0.25)
    assert timer.take() == [(DECODE, pytest.approx(1.75))]

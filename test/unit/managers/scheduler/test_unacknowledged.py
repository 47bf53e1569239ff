"""The scheduler's ring: what it keeps, what it says again, and what it gives up first."""

from __future__ import annotations

from sglang_harli.managers.scheduler.unacknowledged import AGAIN_AFTER_S, AGAIN_AT_ONCE, Unacknowledged
from sglang_harli.protocol import internal

RUN = {"job": "j", "attempt": 1}


def step(seq: int) -> internal.StepDone:
    return internal.StepDone(
        seq=seq,
        **RUN,
        step=seq,
        epoch=1,
        loss=1.0,
        learning_rate=1.0,
        grad_norm=1.0,
        tokens=1,
        target_tokens=1,
        seconds=1.0,
        after=seq - 1,
    )


def failed(seq: int) -> internal.RunFailed:
    return internal.RunFailed(seq=seq, **RUN, step=seq, code="c", message="m", after=seq - 1)


def seqs(messages: list[internal.Message]) -> list[int]:
    return [m.seq for m in messages]


def test_one_lost_message_is_said_again_whatever_came_after_it():
    ring = Unacknowledged()
    for seq in (1, 2, 3):
        ring.keep(step(seq), 0.0)
    ring.acknowledged([2, 3], 1.0)
    assert ring.due(1.0 + AGAIN_AFTER_S - 0.1) == []
    assert seqs(ring.due(1.0 + AGAIN_AFTER_S)) == [1]
    assert ring.due(1.0 + AGAIN_AFTER_S) == []  # not twice in a row
    ring.acknowledged([1, 99], 9.0)
    assert len(ring) == 0 and ring.due(1e9) == []


def test_what_is_said_again_in_one_turn_is_bounded_and_the_oldest():
    ring = Unacknowledged()
    for seq in range(1, 100):
        ring.keep(step(seq), 0.0)
    assert seqs(ring.due(AGAIN_AFTER_S)) == list(range(1, AGAIN_AT_ONCE + 1))


def test_an_overflow_takes_metrics_and_never_the_end_of_a_run():
    ring = Unacknowledged(size=4)
    ring.keep(failed(1), 0.0)
    for seq in (2, 3, 4, 5, 6):
        ring.keep(step(seq), 0.0)
    assert seqs(ring.all()) == [1, 4, 5, 6]
    first = ring.all()[1]
    assert isinstance(first, internal.StepDone) and first.after == 1  # it does not wait for what is gone
    for seq in (7, 8, 9):
        ring.keep(failed(seq), 0.0)
    assert seqs(ring.all()) == [1, 7, 8, 9]


def test_a_stop_that_is_said_again_takes_no_more_room():
    ring = Unacknowledged()
    for seq in (1, 2, 3):
        ring.keep(internal.RunStopped(seq=seq, **RUN, step=0), 0.0)
    assert seqs(ring.all()) == [3]

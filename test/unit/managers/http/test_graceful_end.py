"""SIGTERM: training stops at once, and its state is saved while requests are still answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli.managers.scheduler.training.co_trainer import ENDING
from sglang_harli.protocol import internal
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


@pytest.fixture
def training(run_dir: str) -> Iterator[tuple[Host, Peer]]:
    """A run that has taken two steps and is in the third; it has a slot."""
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    give_slot(peer, run_dir)
    for step in (1, 2, 3):
        peer.send(*batch(step))
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 2)
    for _ in range(3):
        host.turn()
    yield host, peer
    host.link.close()
    peer.socket.close()


def test_the_state_is_saved_in_slices_and_the_job_goes_back_to_the_queue(training, run_dir):
    host, peer = training
    host.trainer.end_soon()
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    [ready] = peer.of(internal.SnapshotReady)
    assert ready.step == 2  # the step in flight is dropped
    assert host.trainer.training
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=2))
    until(host, peer, lambda: peer.of(internal.RunStopped))
    [stopped] = peer.of(internal.RunStopped)
    assert (stopped.step, stopped.reason) == (2, ENDING)
    assert not host.trainer.training and len(peer.of(internal.StepDone)) == 2
    since = time.monotonic()
    host.trainer.shutdown(8.0)
    assert time.monotonic() - since < 1.0  # nothing is left to do when the scheduler hears of the end
    host.trainer.hold_runs("")  # the end is no reason that goes away
    peer.send(internal.StartRun(spec=spec(2)))
    until(host, peer, lambda: peer.of(internal.Hello)[-1].hold == ENDING)
    for _ in range(20):
        host.turn()
    assert not host.trainer.training


def test_what_is_not_saved_yet_when_the_scheduler_ends_is_saved_then(training):
    host, peer = training
    host.trainer.end_soon()
    assert not peer.of(internal.SnapshotReady)
    host.trainer.shutdown(0.0)
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    assert peer.of(internal.SnapshotReady)[0].step == 2


def test_a_pause_that_is_under_way_stays_one(training):
    host, peer = training
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=True))
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    host.trainer.end_soon()
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=2))
    until(host, peer, lambda: peer.of(internal.RunStopped))
    assert peer.of(internal.RunStopped)[0].step == 2 and len(peer.of(internal.SnapshotReady)) == 1


def test_a_run_that_is_trained_saves_its_last_state_as_such(training):
    host, peer = training
    peer.send(*batch(4))
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 4)
    host.trainer.end_soon()
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    assert [(m.step, m.reason) for m in peer.of(internal.SnapshotReady)] == [(4, "final")]
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=4))
    until(host, peer, lambda: not host.trainer.training)
    assert not peer.of(internal.RunStopped)


def test_without_a_run_only_the_queue_is_held(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    host.trainer.end_soon()
    until(host, peer, lambda: [m.hold for m in peer.of(internal.Hello)] == ["", ENDING])
    host.link.close()
    peer.socket.close()

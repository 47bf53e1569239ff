"""A run's whole life on the stream that trains, under SGLang's loop on another one: nothing that a
run computes with is made, changed or copied where no event orders it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer
from sglang_harli.protocol import internal
from support.cuda.happens_before import HappensBefore, OrderedDevice
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until


class Rig:
    """A trainer whose quanta run on ``forward``, driven from ``schedule``."""

    def __init__(self, run_dir: str) -> None:
        self.device = OrderedDevice()
        self.forward, self.schedule = self.device.Stream(), self.device.Stream()
        self.peer = Peer(run_dir)
        timer = DeviceQuantumTimer(self.device, lambda: self.forward)
        self.host = Host(run_dir, timer=timer)
        until(self.host, self.peer, lambda: self.peer.of(internal.Hello))

    def close(self) -> None:
        self.host.link.close()
        self.peer.socket.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    for run_dir in temporary_run_dir(tmp_path):
        made = Rig(run_dir)
        with made.device.stream(made.schedule), HappensBefore(made.device) as checker:
            yield made
        assert checker.operations > 500
        made.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def test_a_run_is_made_where_it_trains(rig: Rig):
    host, peer = rig.host, rig.peer
    peer.send(internal.StartRun(spec=spec(1, 2, gradient_accumulation_steps=1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    for step in (1, 2):
        peer.send(*batch(step))
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 2)
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    until(host, peer, lambda: host.trainer.run is None)


def test_a_shutdown_ends_a_step_and_saves_it_where_it_trains(rig: Rig, run_dir: str):
    """The optimizer is in the midst of a step, and its slices are on the device still."""
    host, peer, trainer = rig.host, rig.peer, rig.host.trainer
    peer.send(internal.StartRun(spec=spec(1, 4)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    slot = give_slot(peer, run_dir)
    peer.send(*batch(1))
    until(host, peer, lambda: trainer.run is not None and not trainer.run.training.state_consistent)
    trainer.shutdown(0.0)
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    (ready,) = peer.of(internal.SnapshotReady)
    assert ready.step == 1 and ready.reason == "shutdown"
    slot.close()

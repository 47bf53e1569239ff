"""A run's whole life on the stream that trains, under SGLang's loop on another one: nothing that a
run computes with is made, changed or copied where no event orders it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_harli.core import MemoryPurpose
from sglang_harli.device_sizes import SIZES
from sglang_harli.managers.scheduler.training import state_copier
from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.peft_trainer import device_calls
from sglang_harli.protocol import internal
from support.cuda.happens_before import HappensBefore, OrderedDevice
from support.pool_parts import small_pool
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until

GEOMETRY = PoolGeometry(slots=64 * 300 + 17, row_bytes=256, buffers=4, page_size=1, stripe_slots=64)


class Rig:
    """A trainer whose quanta run on ``forward``, driven from ``schedule``, in memory that a pool
    lends in place; its state is copied on a third stream."""

    def __init__(self, run_dir: str, patch: pytest.MonkeyPatch) -> None:
        self.device = device = OrderedDevice()
        self.forward, self.schedule, self.copies = (device.Stream() for _ in range(3))
        self.checker = HappensBefore(device)
        self.peer = Peer(run_dir)
        timer = DeviceQuantumTimer(device, lambda: self.forward)
        with device.stream(self.schedule):
            backing = StaticBacking(GEOMETRY, "cpu", stream=self.forward, module=device)
            pool, _, _ = small_pool(GEOMETRY, backing=backing)
        self.host = Host(run_dir, timer=timer, pool=pool)
        patch.setattr(state_copier, "on_device", lambda tensor: True)
        patch.setitem(SIZES, "cuda", dataclasses.replace(SIZES["cuda"], snapshot_bytes=1024))
        for name, call in {
            "pinned": lambda shape, dtype: self.checker.staging(torch.empty(shape, dtype=dtype)),
            "copy_stream": lambda _: self.copies,
            "on_stream": device.stream,
            "current_stream": device.current_stream,
            "event": lambda: device.current_stream().record_event(),
        }.items():
            patch.setattr(device_calls, name, call)
        until(self.host, self.peer, lambda: self.peer.of(internal.Hello))

    def close(self) -> None:
        self.host.link.close()
        self.peer.socket.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Rig]:
    """The trainer logs what goes wrong and goes on: no such line may be there at the end."""
    for run_dir in temporary_run_dir(tmp_path):
        made = Rig(run_dir, monkeypatch)
        with made.device.stream(made.schedule), made.checker:
            yield made
        assert made.checker.operations > 500
        assert not [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
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


@pytest.mark.parametrize("ends", ["saved", "cancelled"])
def test_a_copy_of_the_state_stands_behind_the_step_and_before_what_takes_its_memory(
    rig: Rig, run_dir: str, ends: str
):
    host, peer, trainer = rig.host, rig.peer, rig.host.trainer
    peer.send(internal.StartRun(spec=spec(1, 3, checkpoint_every=1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    slot = give_slot(peer, run_dir)
    for step in (1, 2):
        peer.send(*batch(step))
    until(host, peer, lambda: trainer.run is not None and trainer.run.copying)
    until(host, peer, lambda: trainer.run._copier._flights)
    if ends == "cancelled":
        peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
        until(host, peer, lambda: trainer.run is None)
        lent = host.pressure.pool.lease(MemoryPurpose.STATE, "next", 4)
        with rig.device.stream(rig.forward):
            lent.extents[0].fill_(1)
    else:
        until(host, peer, lambda: peer.of(internal.SnapshotReady))
    slot.close()

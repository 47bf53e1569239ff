"""Copies of the state from a device: several on their way, training beside them, one step's state.

The device is played by host memory: a copy into a pinned buffer is made when its event is said to
have fired, from what the tensor holds then."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.device_sizes import SIZES
from sglang_harli.managers.scheduler.training import state_copier
from sglang_harli.managers.scheduler.training.state_copier import StateCopier, reader, state_layout
from sglang_harli.peft_trainer import device_calls
from sglang_harli.protocol import internal
from sglang_harli.protocol.shared_memory import SharedBuffer
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until

BUFFERS = SIZES["cuda"].snapshot_buffers


class Device:
    """Copies happen as late as they may: when their event is asked for the ``slow``-th time."""

    def __init__(self, slow: int) -> None:
        self.slow, self.most = slow, 0
        self.inside = False
        self.pending: list[Event] = []
        self.waits = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(state_copier, "on_device", lambda tensor: True)
        patch.setattr(device_calls, "pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        patch.setattr(device_calls, "copy_stream", lambda device: self)
        patch.setattr(device_calls, "current_stream", lambda device: self)
        patch.setattr(device_calls, "on_stream", self.on_stream)
        patch.setattr(device_calls, "event", lambda: Event(self))
        real = state_copier.StateCopier._send

        def late(copier: Any, piece: Any) -> None:
            real(copier, piece)
            flight = copier._flights[-1]
            source = flight.piece.read()
            flight.staged.fill_(0xEE)  # nothing has arrived yet
            flight.event.action = lambda: flight.staged[: len(source)].copy_(source)
            self.pending.append(flight.event)
            self.most = max(self.most, len(self.pending))

        patch.setattr(state_copier.StateCopier, "_send", late)

    def wait_event(self, event: Event) -> None:
        self.waits += 1

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        assert stream is self
        yield


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.asked, self.action = device, 0, lambda: None

    def query(self) -> bool:
        self.asked += 1
        if self.asked >= self.device.slow:
            self.synchronize()
        return self.asked >= self.device.slow

    def synchronize(self) -> None:
        self.asked = self.device.slow
        self.action()
        self.action = lambda: None
        if self in self.device.pending:
            self.device.pending.remove(self)


@pytest.fixture(params=[1, 5])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(request.param)
    made.install(monkeypatch)
    monkeypatch.setitem(SIZES, "cuda", dataclasses.replace(SIZES["cuda"], snapshot_bytes=256))
    return made


def test_a_copy_keeps_several_slices_on_their_way(device: Device, tmp_path: Path) -> None:
    tensors = [(f"t{i}", torch.randn(300 + i)) for i in range(5)]
    refs, nbytes = state_layout(tensors)
    slot = SharedBuffer.create(tmp_path, nbytes)
    copier = StateCopier(tensors, slot, refs)
    visits = 0
    while not copier.done:
        visits += 1
        assert copier.beside
        if copier.ready:
            copier.run()
    assert device.most == BUFFERS
    assert device.waits == 1  # behind what was written before; nothing is written meanwhile
    get = reader(slot, refs)
    for name, tensor in tensors:
        assert torch.equal(get(name), tensor), name


def test_an_abandoned_copy_is_waited_for_by_what_follows(device: Device, tmp_path: Path) -> None:
    tensors = [("t", torch.randn(1000))]
    refs, nbytes = state_layout(tensors)
    copier = StateCopier(tensors, SharedBuffer.create(tmp_path, nbytes), refs)
    copier.run()
    before = device.waits
    copier.abandon()
    assert copier.done and device.waits == before + 1


def test_training_goes_on_beside_a_snapshot_of_one_step(device: Device, tmp_path: Path) -> None:
    folder = temporary_run_dir(tmp_path)
    path = next(folder)
    peer, host = Peer(path), Host(path)
    try:
        until(host, peer, lambda: peer.of(internal.Hello))
        peer.send(internal.StartRun(spec=spec(steps=2, checkpoint_every=1)))
        until(host, peer, lambda: peer.of(internal.RunStarted))
        give_slot(peer, path)
        peer.send(*batch(1))
        peer.send(*batch(2))
        until(host, peer, lambda: host.trainer.run is not None and host.trainer.run.copying)
        run = host.trainer.run
        assert run is not None
        state = {name: tensor.clone() for name, tensor in run.training.state_tensors()}
        kinds: list[QuantumKind] = []
        while run.copying:
            offer = host.trainer.offer()
            if offer is not None:
                kinds.append(offer.kind)
            host.turn()
            assert run.training.applied_step == 1 or not run.copying
        assert {QuantumKind.COPY, QuantumKind.FORWARD, QuantumKind.BACKWARD} <= set(kinds)
        assert QuantumKind.OPTIMIZER not in kinds
        until(host, peer, lambda: peer.of(internal.SnapshotReady))
        ready = peer.of(internal.SnapshotReady)[0]
        assert ready.step == 1
        get = reader(SharedBuffer.open(ready.slot), list(ready.slot.tensors))
        for name, tensor in state.items():
            assert torch.equal(get(name), tensor), name
        peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=1))
        until(host, peer, lambda: len(peer.of(internal.StepDone)) == 2)
        assert not peer.of(internal.RunFailed)
    finally:
        host.link.close()
        peer.socket.close()
    next(folder, None)

"""A copy of a run's state that waits for the device: nothing to run, and nothing to spin on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli.core import StepLoad
from sglang_harli.managers.scheduler.training.state_copier import StateCopier
from sglang_harli.protocol import internal
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def test_no_quantum_is_offered_until_the_device_has_done_its_part(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, host = Peer(run_dir), Host(run_dir)
    trainer = host.trainer
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1, 4, checkpoint_every=1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    slot = give_slot(peer, run_dir)
    peer.send(*batch(1))
    until(host, peer, lambda: trainer.run is not None and trainer.run.copying)

    with monkeypatch.context() as device:  # its answer: the copies are not there yet
        device.setattr(StateCopier, "beside", True)
        device.setattr(StateCopier, "ready", False)
        quanta = trainer.quanta
        assert trainer.offer() is None and trainer.claimed() is None
        assert not trainer.slotting.fill_idle(StepLoad, host.side.targets, float("inf"))
        trainer.slotting.prefilled()
        assert trainer.quanta == quanta and trainer.run is not None and trainer.run.copying

    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    slot.close()
    host.link.close()
    peer.socket.close()

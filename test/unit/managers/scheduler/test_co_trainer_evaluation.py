"""A run that evaluates, over the real link: its messages, its snapshots, and its last step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sglang_harli.peft_trainer.evaluation import Evaluations
from sglang_harli.protocol import internal
from sglang_harli.protocol.shared_memory import SharedBuffer
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until

BEHIND = internal.EvaluationBatches(count=1, sampled=1, whole=True)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


@pytest.fixture
def peer(run_dir: str) -> Iterator[Peer]:
    peer = Peer(run_dir)
    yield peer
    peer.socket.close()


@pytest.fixture
def host(run_dir: str, peer: Peer) -> Iterator[Host]:
    host = Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    yield host
    host.link.close()


def begin(host: Host, peer: Peer, **hp: object) -> None:
    peer.send(internal.StartRun(spec=spec(**hp)))
    until(host, peer, lambda: peer.of(internal.RunStarted))


def send(peer: Peer, step: int, *, evaluated: bool = True) -> None:
    """A step's micro-batch, and the one that is evaluated behind it."""
    message, *frames = batch(step)
    if not evaluated:
        peer.send(message, *frames)
        return
    peer.send(msgspec.structs.replace(message, evaluation=BEHIND), *frames)
    cursor = internal.BatchCursor(epoch=1, step=step, index=1)
    held, *frames = batch(77)
    peer.send(msgspec.structs.replace(held, evaluation=BEHIND, cursor=cursor), *frames)


def snapshot(peer: Peer, reason: str) -> tuple[internal.SnapshotReady, dict[str, bytes]]:
    ready = next(m for m in peer.of(internal.SnapshotReady) if m.reason == reason)
    slot = SharedBuffer.open(ready.slot)
    return ready, {ref.name: bytes(slot.view(ref)) for ref in ready.slot.tensors}


def test_patience_ends_the_run_with_a_final_snapshot(host: Host, peer: Peer, run_dir: str) -> None:
    begin(host, peer, early_stopping_patience=1, early_stopping_min_delta=1e6)
    give_slot(peer, run_dir)
    for step in (1, 2, 3):
        send(peer, step)
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    ready, _ = snapshot(peer, "best")
    assert (ready.step, ready.evaluated) == (1, 1) and ready.train_loss is not None
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=1))
    until(host, peer, lambda: peer.of(internal.SnapshotReady)[-1].reason == "final")
    ready, _ = snapshot(peer, "final")
    assert ready.step == ready.evaluated == 2
    first, second = peer.of(internal.EvaluationDone)
    assert (first.step, second.step) == (1, 2)
    assert second.state == internal.state_in(ready.meta) and second.state.stale == 1
    assert second.rows == 2 and second.full_valid_loss == second.valid_loss
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=2))
    until(host, peer, lambda: host.trainer.run is None)
    assert [m.step for m in peer.of(internal.StepDone)] == [1, 2]


def test_the_best_state_waits_for_its_slot_and_is_not_replaced(host: Host, peer: Peer, run_dir: str) -> None:
    begin(host, peer)
    send(peer, 1)
    send(peer, 2)
    until(host, peer, lambda: peer.of(internal.EvaluationDone))
    for _ in range(100):  # it goes on to the update of the next step, and no further
        host.turn()
    assert host.trainer.run is not None and host.trainer.run.training.applied_step == 1
    assert host.trainer.run.waiting_for()[0] == "checkpointing"
    give_slot(peer, run_dir)
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 2)
    ready, best = snapshot(peer, "best")
    assert ready.step == 1
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    until(host, peer, lambda: peer.of(internal.RunStopped))

    peer.send(internal.StartRun(spec=spec(2, checkpoint_every=1)))
    until(host, peer, lambda: [m for m in peer.of(internal.RunStarted) if m.attempt == 2])
    give_slot(peer, run_dir, 2)
    message, *frames = batch(1, 2)
    host.turn()
    peer.send(message, *frames)
    until(host, peer, lambda: [m for m in peer.of(internal.SnapshotReady) if m.reason == "every"])
    assert snapshot(peer, "every")[1] == best


def test_a_result_that_is_on_its_way_is_waited_for_without_a_quantum(
    host: Host, peer: Peer, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device whose results reach the host later."""
    arrived: list[bool] = []
    take = Evaluations.take
    monkeypatch.setattr(Evaluations, "take", lambda self: take(self) if arrived else [])
    begin(host, peer, steps=1)
    give_slot(peer, run_dir)
    send(peer, 1)
    until(host, peer, lambda: host.trainer.run is not None and host.trainer.run.training.settling)
    for _ in range(20):
        assert not host.turn()
    assert host.trainer.run is not None
    assert host.trainer.run.waiting_for() == ("training", "waiting for the result of the evaluation")
    assert not peer.of(internal.SnapshotReady)
    arrived.append(True)
    until(host, peer, lambda: [m for m in peer.of(internal.SnapshotReady) if m.reason == "final"])
    assert [m.step for m in peer.of(internal.EvaluationDone)] == [1]


def test_a_pause_within_an_evaluation_ends_it_and_it_begins_there_again(
    host: Host, peer: Peer, run_dir: str
) -> None:
    begin(host, peer)
    give_slot(peer, run_dir)
    message, *frames = batch(1)
    peer.send(msgspec.structs.replace(message, evaluation=BEHIND), *frames)
    until(host, peer, lambda: host.trainer.run is not None and host.trainer.run.training.evaluating)
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=True))
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    ready, tensors = snapshot(peer, "pause")
    assert (ready.step, ready.evaluated) == (1, 0)
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=1))
    until(host, peer, lambda: peer.of(internal.RunStopped))
    restore = SharedBuffer.create(Path(ready.slot.path).parent, ready.slot.nbytes)
    for ref in ready.slot.tensors:
        restore.view(ref)[:] = tensors[ref.name]
    begins = internal.BatchCursor(epoch=1, step=1, index=1)
    slot = restore.ref(ready.slot.tensors)
    peer.send(internal.StartRun(spec=spec(2), step=1, restore=slot, meta=ready.meta, begin=begins))
    until(host, peer, lambda: [m for m in peer.of(internal.RunStarted) if m.attempt == 2])
    held, *frames = batch(77, 2)
    peer.send(msgspec.structs.replace(held, evaluation=BEHIND, cursor=begins), *frames)
    until(host, peer, lambda: peer.of(internal.EvaluationDone))
    [done] = peer.of(internal.EvaluationDone)
    assert (done.step, done.attempt, done.after) == (1, 2, 1)

"""What is lost, doubled or late between service and scheduler, at the scheduler's end of the real
link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

from sglang_harli.core import Reason
from sglang_harli.managers.scheduler.training import co_trainer
from sglang_harli.protocol import internal
from sglang_harli.protocol.base_print import difference
from sglang_harli.run_paths import shm_dir
from support.trainer.co_trainer_host import Host, Peer, batch, give_slot, spec, temporary_run_dir, until


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def test_what_comes_twice_late_or_leaves_a_gap_changes_nothing(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    peer.send(internal.StartRun(spec=spec(1)))  # overtaken by its own stop
    peer.send(internal.StartRun(spec=spec(3), scheduler=12345))  # for a process that died
    for _ in range(2):
        peer.send(internal.StartRun(spec=spec(2)))
        peer.send(*batch(1, 2))
    peer.send(*batch(3, 2))
    peer.send(*batch(2, 2))
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 2)
    assert [m.step for m in peer.of(internal.StepDone)] == [1, 2]
    assert [m.after for m in peer.of(internal.StepDone)] == [0, 1]
    assert [m.attempt for m in peer.of(internal.RunStarted)] == [2]
    assert [m.attempt for m in peer.of(internal.RunStopped)] == [1]
    assert not peer.of(internal.RunFailed)
    assert host.trainer.run is not None and host.trainer.run.training.next_cursor.step == 3
    host.link.close()
    peer.socket.close()


def test_pulses_say_what_is_missing_until_it_comes(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1, steps=1)))
    until(host, peer, lambda: any(p.state_bytes and not p.has_slot for p in peer.of(internal.Pulse)))
    give_slot(peer, run_dir)
    peer.send(*batch(1))
    until(host, peer, lambda: peer.of(internal.SnapshotReady))
    peer.send(internal.Ack(seqs=[m.seq for m in peer.got]))  # and the SnapshotSaved behind it is lost
    until(host, peer, lambda: len(peer.of(internal.SnapshotReady, repeated=True)) == 2)
    until(host, peer, lambda: peer.of(internal.Pulse)[-1].snapshot == 1)
    for _ in range(2):
        peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=1))
    until(host, peer, lambda: host.trainer.run is None)
    assert not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()


def test_what_is_not_acknowledged_is_sent_again_without_a_restart(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    peer.send(*batch(1))
    until(host, peer, lambda: len(peer.of(internal.StepDone, repeated=True)) == 2)  # the same one, twice
    first, second = peer.of(internal.StepDone, repeated=True)
    assert (first.seq, first.step) == (second.seq, second.step)
    peer.send(internal.Ack(seqs=[m.seq for m in peer.got]))
    until(host, peer, lambda: host.link.unacknowledged == 0)
    host.link.close()
    peer.socket.close()


def test_a_start_while_no_run_is_taken_is_dropped_and_answered_by_a_hello(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    host.trainer.hold_runs("the served model is being checked")
    until(host, peer, lambda: [m.hold for m in peer.of(internal.Hello)] == ["", host.trainer.hold])
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: len(peer.of(internal.Hello)) == 3)
    assert host.trainer.run is None
    host.trainer.hold_runs("")
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    assert peer.of(internal.Hello)[-1].hold == "" and not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()


def test_a_slot_that_cannot_be_mapped_is_no_verdict_on_the_job(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    gone = internal.SlotRef(path=str(shm_dir(run_dir) / "slot-gone"), nbytes=64)
    peer.send(internal.StartRun(spec=spec(1), restore=gone))
    until(host, peer, lambda: peer.of(internal.RunFailed))
    [failed] = peer.of(internal.RunFailed)
    assert failed.passing and "slot-gone" in failed.message
    assert host.trainer.run is None and host.pressure.status()["train_bytes"] == 0
    host.link.close()
    peer.socket.close()


def test_after_an_update_of_the_weights_the_print_is_taken_again_and_older_starts_are_dropped(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    with torch.no_grad():
        host.base.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    host.trainer.weights_updated()
    until(host, peer, lambda: len(peer.of(internal.Hello)) == 2)
    before, after = peer.of(internal.Hello)
    assert (before.updates, after.updates) == (0, 1)
    assert difference(before.base, after.base) == "their weights differ"
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: len(peer.of(internal.Hello)) == 3)
    assert host.trainer.run is None
    peer.send(internal.StartRun(spec=spec(1), updates=1))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    host.link.close()
    peer.socket.close()


def unreadable(host: Host) -> Callable[[], None]:
    """No print can be taken of the weights, as where the device lacks memory for it, until what
    comes back is called."""
    norm = host.base.model.model.norm
    weight = norm.weight
    norm.weight = torch.nn.Parameter(torch.empty(0))
    return lambda: setattr(norm, "weight", weight)


def test_the_print_of_updated_weights_is_said_to_be_lacking_and_taken_when_it_can_be(run_dir, monkeypatch):
    monkeypatch.setattr(co_trainer, "TAKE_PRINT_EVERY_S", 0.2)
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    mend = unreadable(host)
    host.trainer.weights_updated()
    until(host, peer, lambda: peer.of(internal.Hello)[-1].hold)
    told = peer.of(internal.Hello)[-1]
    assert (told.base, told.updates, told.hold) == (None, 1, co_trainer.NOT_KNOWN)
    peer.send(internal.StartRun(spec=spec(1), updates=1))
    for _ in range(20):
        host.turn()
        peer.pump()
    assert host.trainer.run is None
    mend()
    until(host, peer, lambda: not peer.of(internal.Hello)[-1].hold)
    told = peer.of(internal.Hello)[-1]
    assert (told.base, told.updates) == (host.trainer.base_print, 1)
    peer.send(internal.StartRun(spec=spec(1), updates=1))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    host.link.close()
    peer.socket.close()


@pytest.mark.parametrize("became", ["the same", "others", "unknown"])
def test_a_run_is_given_up_where_the_weights_under_it_are_others_now(run_dir, became):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    if became == "others":
        with torch.no_grad():
            host.base.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    elif became == "unknown":
        unreadable(host)
    host.trainer.weights_updated()
    until(host, peer, lambda: peer.of(internal.Hello)[-1].updates == 1)
    if became == "the same":
        assert host.trainer.run is not None and not peer.of(internal.RunStopped)
    else:
        assert host.trainer.run is None and host.pressure.status()["train_bytes"] == 0
        [stopped] = peer.of(internal.RunStopped)
        assert "the served weights were updated" in stopped.reason
    host.link.close()
    peer.socket.close()


def test_runs_are_held_until_all_who_hold_them_have_let_go(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    trainer = host.trainer
    trainer.memory_released(True)
    trainer.hold_runs("the served model is being checked")
    trainer.hold_runs("")
    assert trainer.hold == Reason.MEMORY_RELEASED
    trainer.hold_runs("the served model is being checked")
    trainer.memory_released(False)
    assert trainer.hold == "the served model is being checked"
    trainer.hold_runs("")
    assert trainer.hold == ""
    host.link.close()
    peer.socket.close()


def part(index: int, of: int) -> tuple[internal.MicroBatch, bytes, bytes, bytes]:
    message, *arrays = batch(1)
    cursor = internal.BatchCursor(epoch=1, step=1, index=index)
    return msgspec.structs.replace(message, cursor=cursor, micro_batches=of), *arrays


def test_the_scheduler_says_which_micro_batches_of_a_step_it_is_done_with(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(gradient_accumulation_steps=24)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    run = host.trainer.run
    assert run is not None
    for index in range(20):
        peer.send(*part(index, 24))
    while run.training.batches_ahead < 20:  # none is trained meanwhile
        host.trainer.poll()
    assert (run.training.taken.step, run.training.taken.index) == (1, 0)
    until(host, peer, lambda: run.training.batches_ahead == 0 and run.training.taken.index == 20)
    until(host, peer, lambda: peer.of(internal.BatchesTaken)[-1].cursor.index == 20)
    told = [m.cursor.index for m in peer.of(internal.BatchesTaken)]
    assert told[0] == 8 and told == sorted(told) and max(b - a for a, b in pairwise(told)) <= 8
    until(host, peer, lambda: (taken := peer.of(internal.Pulse)[-1].taken) and taken.index == 20)
    for index in range(20, 24):
        peer.send(*part(index, 24))
    until(host, peer, lambda: peer.of(internal.StepDone))
    assert not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()


def test_while_requests_are_served_a_turn_takes_one_micro_batch(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(gradient_accumulation_steps=8)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    run = host.trainer.run
    assert run is not None
    for index in range(6):
        peer.send(*part(index, 8))
    seen = [0]
    while seen[-1] < 6:
        host.trainer.poll(serving=True)
        if run.training.batches_ahead != seen[-1]:
            seen.append(run.training.batches_ahead)
    assert seen == list(range(7))
    host.link.close()
    peer.socket.close()

"""The scheduler's trainer over the real link, with a small peer that speaks the service's side.

The host holds a transformers model in place of SGLang's; training, link, snapshots and shared
memory are the real ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_harli.core import Decision, QuantumKind, Reason, StepLoad
from sglang_harli.device_sizes import sizes_of
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack
from sglang_harli.managers.scheduler.training import active_run
from sglang_harli.peft_trainer.graphs.layer_graphs import LayerGraphs
from sglang_harli.protocol import internal
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.run_paths import shm_dir
from support.cuda.graph_double import CaptureDouble
from support.trainer.co_trainer_host import (
    VOCAB,
    Host,
    Peer,
    batch,
    give_slot,
    spec,
    temporary_run_dir,
    until,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def tensors_of(ready: internal.SnapshotReady) -> dict[str, bytes]:
    slot = SharedBuffer.open(ready.slot)
    return {ref.name: bytes(slot.view(ref)) for ref in ready.slot.tensors}


def run_to_end(
    run_dir: str, *, pause_at: int | None = None, quantum_rows: int | None = 1, held: bool = False
) -> dict[str, bytes]:
    """Train 4 steps, perhaps with a pause and a resume in between; the final snapshot's tensors.

    ``held``: requests are paused (/pause_generation) while the job is.
    """
    peer, host = Peer(run_dir), Host(run_dir, quantum_rows=quantum_rows)
    until(host, peer, lambda: peer.of(internal.Hello))
    start = internal.StartRun(spec=spec())
    peer.send(start)
    until(host, peer, lambda: peer.of(internal.RunStarted))
    give_slot(peer, run_dir)
    attempt, first = 1, 1
    if pause_at is not None:
        for step in range(
            1, pause_at + 2
        ):  # one more than is wanted: the pause finds a micro-batch in flight
            peer.send(*batch(step))
        until(host, peer, lambda: len(peer.of(internal.StepDone)) >= pause_at)
        for _ in range(3):
            host.turn()
        host.trainer.held = held
        peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=True))
        until(host, peer, lambda: peer.of(internal.SnapshotReady))
        ready = peer.of(internal.SnapshotReady)[-1]
        assert ready.reason == "pause"
        kept = tensors_of(ready)
        peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=ready.step))
        until(host, peer, lambda: peer.of(internal.RunStopped))
        assert host.trainer.run is None and peer.of(internal.RunStopped)[-1].step == ready.step
        restore = SharedBuffer.create(shm_dir(run_dir), ready.slot.nbytes)
        for ref in ready.slot.tensors:
            restore.view(ref)[:] = kept[ref.name]
        host.trainer.held = False
        attempt, first = 2, ready.step + 1
        peer.send(
            internal.StartRun(
                spec=spec(2), step=ready.step, restore=restore.ref(ready.slot.tensors), meta=ready.meta
            )
        )
        until(host, peer, lambda: [m for m in peer.of(internal.RunStarted) if m.attempt == 2])
        give_slot(peer, run_dir, 2)
    for step in range(first, 5):
        peer.send(*batch(step, attempt))
    until(host, peer, lambda: [m for m in peer.of(internal.SnapshotReady) if m.reason == "final"])
    final = peer.of(internal.SnapshotReady)[-1]
    assert final.step == 4
    state = tensors_of(final)
    peer.send(internal.SnapshotSaved(job="job-1", attempt=attempt, step=4))
    until(host, peer, lambda: host.trainer.run is None)
    assert [m.step for m in peer.of(internal.StepDone)] == [1, 2, 3, 4]
    assert not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()
    return state


@pytest.mark.parametrize("held", [False, True])
def test_a_pause_in_the_middle_of_a_step_changes_no_bit(run_dir, held):
    straight = run_to_end(run_dir)
    paused = run_to_end(run_dir, pause_at=2, held=held)
    assert straight.keys() == paused.keys() and straight
    assert all(straight[name] == paused[name] for name in straight)
    assert any(name.startswith("adapter/base_model.model.") for name in straight)


def test_bad_data_found_late_fails_the_job_and_returns_its_memory(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    message, ids, places, targets = batch(1)
    wrong = np.frombuffer(ids, dtype=np.int32).copy()
    wrong[0] = VOCAB + 5
    peer.send(message, wrong.tobytes(), places, targets)
    until(host, peer, lambda: peer.of(internal.RunFailed))
    failed = peer.of(internal.RunFailed)[-1]
    assert (failed.job, failed.code) == ("job-1", "bad_data") and "tokenizer" in failed.message
    assert host.trainer.run is None and not host.trainer.busy
    peer.send(internal.StartRun(spec=spec(2)))  # the host goes on
    until(host, peer, lambda: [m for m in peer.of(internal.RunStarted) if m.attempt == 2])
    host.link.close()
    peer.socket.close()


def test_a_loss_that_is_not_finite_fails_the_job_with_what_to_change(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    with torch.no_grad():
        host.base.model.model.norm.weight.fill_(float("nan"))
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(*batch(1))
    until(host, peer, lambda: peer.of(internal.RunFailed))
    assert peer.of(internal.RunFailed)[-1].code == "loss_not_finite"
    host.link.close()
    peer.socket.close()


def test_cancel_stops_at_the_next_quantum(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(*batch(1))
    for _ in range(3):
        host.turn()
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    until(host, peer, lambda: peer.of(internal.RunStopped))
    assert host.trainer.run is None
    host.link.close()
    peer.socket.close()


class Backlog:
    """Prompts wait, and no step of serving leaves time for training."""

    def __init__(self, host: Host) -> None:
        self.targets, self.running = host.side.targets, 2

    def load(self) -> StepLoad:
        return StepLoad(running=2, waiting=5)

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        return Slack(-1.0, "tpot")


def under_a_backlog(host: Host, peer: Peer, reached: Callable[[], object], *, limit_s: float = 60.0) -> None:
    """Turns of a loop that is never idle."""
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline
        host.trainer.poll()
        if host.trainer.slotting.decoded(finished=True):
            host.trainer.slotting.fill(Backlog(host))
        peer.pump()


def half_applied(host: Host) -> bool:
    run = host.trainer.run
    return run is not None and run.training.ready and not run.training.state_consistent


def paused(host: Host, peer: Peer, run_dir: str, turns: Callable[[Callable[[], object]], None]) -> None:
    """A pause that is asked for in the middle of the optimizer's step, or behind it."""
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    give_slot(peer, run_dir)
    peer.send(*batch(1))
    until(host, peer, lambda: half_applied(host))
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=True))
    turns(lambda: peer.of(internal.SnapshotReady))
    ready = peer.of(internal.SnapshotReady)[-1]
    assert (ready.reason, ready.step) == ("pause", 1)
    peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=1))
    turns(lambda: peer.of(internal.RunStopped))
    assert host.trainer.run is None
    host.link.close()
    peer.socket.close()


def test_a_pause_ends_under_a_backlog(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    paused(host, peer, run_dir, lambda reached: under_a_backlog(host, peer, reached))


@pytest.mark.parametrize("engine_paused", [False, True])
def test_a_pause_ends_while_generation_is_paused(run_dir, engine_paused):
    """In mode ``abort`` SGLang's loop is idle; in the others it begins no step at all."""
    peer, host = Peer(run_dir), Host(run_dir)

    def turns(reached: Callable[[], object]) -> None:
        host.trainer.held = True
        if not engine_paused:
            until(host, peer, reached)
            return
        while not reached():
            host.trainer.poll()
            host.trainer.slotting.run_claimed(time.perf_counter() + 0.02)
            peer.pump()

    paused(host, peer, run_dir, turns)
    assert host.trainer.slotting.yielded.totals(0.0).keys() <= {Reason.PAUSED}


def test_nothing_trains_and_no_run_starts_while_sglang_has_released_its_memory(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(*batch(1))
    until(host, peer, lambda: (o := host.trainer.offer()) is not None and o.kind is QuantumKind.FORWARD)
    host.trainer.memory_released(True)
    quanta = host.trainer.quanta
    until(host, peer, lambda: peer.of(internal.Progress)[-1].reason == Reason.MEMORY_RELEASED)
    assert host.trainer.quanta == quanta
    assert host.trainer.slotting.decoded(finished=True)
    assert list(host.trainer.slotting.yielded.totals(1e9)) == [Reason.MEMORY_RELEASED]
    peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=False))
    until(host, peer, lambda: peer.of(internal.RunStopped))
    peer.send(internal.StartRun(spec=spec(2)))
    for _ in range(20):
        host.turn()
        peer.pump()
    assert host.trainer.run is None
    assert peer.of(internal.Hello)[-1].hold == Reason.MEMORY_RELEASED
    host.trainer.memory_released(False)
    until(host, peer, lambda: peer.of(internal.Hello)[-1].hold == "")
    peer.send(internal.StartRun(spec=spec(2)))
    peer.send(*batch(1, attempt=2))
    until(host, peer, lambda: peer.of(internal.StepDone))
    host.link.close()
    peer.socket.close()


def test_what_was_not_acknowledged_is_sent_again_to_a_restarted_service(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(internal.Ack(seqs=[peer.of(internal.RunStarted)[-1].seq]))
    peer.send(*batch(1))
    until(host, peer, lambda: peer.of(internal.StepDone))
    peer.socket.close()
    again = Peer(run_dir, pid=2)
    again.send(internal.Welcome(pid=2))
    until(host, again, lambda: again.of(internal.Hello) and again.of(internal.StepDone))
    assert not again.of(internal.RunStarted)  # acknowledged before
    again.send(internal.Ack(seqs=[m.seq for m in again.of(internal.StepDone)]))
    until(host, again, lambda: host.link.unacknowledged == 0)
    host.link.close()
    again.socket.close()


def test_messages_of_another_attempt_are_dropped(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(3)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(*batch(1, attempt=2))
    peer.send(internal.StatusRequest(request=5))
    until(host, peer, lambda: peer.of(internal.StatusReport))
    report = peer.of(internal.StatusReport)[-1]
    assert report.request == 5 and report.training["batches_ahead"] == 0
    assert "graphs" not in report.training  # a CPU has none
    host.link.close()
    peer.socket.close()


def test_status_counts_the_graphs_of_a_run_that_may_have_them(run_dir, monkeypatch):
    def graphs(base: Any, *most_bytes: int) -> LayerGraphs:
        return LayerGraphs.of(base, CaptureDouble(nbytes=100), *most_bytes)

    monkeypatch.setattr(active_run, "graphs_of", graphs)
    peer, host = Peer(run_dir), Host(run_dir, quantum_rows=None)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1)))
    for step in range(1, 4):
        peer.send(*batch(step))
    until(host, peer, lambda: len(peer.of(internal.StepDone)) == 3)
    found = host.trainer.status({})["graphs"]
    assert found["captured"] == found["held"] > 0 and found["held_bytes"] == 100 * found["held"]
    assert found["replayed"] >= found["captured"] and not (
        found["evicted"] or found["stale"] or found["failed"]
    )
    host.link.close()
    peer.socket.close()


class BrokenLoader:
    """An adapter loader whose first slice raises what nobody expected."""

    pending = True
    urgent = False

    def run_slice(self) -> None:
        self.pending = False
        raise RuntimeError("not expected")


def test_an_adapter_that_cannot_be_loaded_does_not_fail_the_run_of_another_job(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    loader = BrokenLoader()
    host.trainer.loader = loader  # pyright: ignore[reportAttributeAccessIssue]
    peer.send(*batch(1))
    until(host, peer, lambda: peer.of(internal.StepDone))
    assert not loader.pending and not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()


def test_options_that_are_not_accepted_are_answered_and_leave_the_run_alone(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    peer.send(internal.SetOptions(request=1, values={"quantum_rows": 0.5, "tpot_slo_ms": None}))
    peer.send(
        internal.SetOptions(request=2, values={"tpot_slo_ms": None})
    )  # no number: TypeError in the check
    peer.send(*batch(1))
    until(host, peer, lambda: peer.of(internal.StepDone))
    assert [answer.outcome for answer in peer.of(internal.OptionsSet)] == ["conflict", "conflict"]
    assert not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()


def test_a_row_that_is_too_long_for_now_is_taken_in_blocks(run_dir: str) -> None:
    peer, host = Peer(run_dir), Host(run_dir, quantum_rows=None)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(steps=1)))
    peer.send(*batch(1, lengths=(2 * sizes_of("cpu").token_block + 1, 5)))
    trainer = host.trainer
    cuts = []
    while not peer.of(internal.StepDone):
        if (offer := trainer.offer()) is not None and trainer.cut(offer.kind):
            again = trainer.offer()
            assert again is not None and not again.fixed
            if offer.kind is QuantumKind.FORWARD:  # its last block is the smallest
                assert [rows for rows, _ in again.candidates] == [1, 2, 3]
                assert again.candidates[0][1] <= offer.candidates[0][1]
            trainer.run_quantum(again, Decision(1, 1, Reason.SLACK))
            cuts.append(offer.kind)
            continue
        if not host.turn():
            host.link.socket.poll(5)
        peer.pump()
    assert cuts.count(QuantumKind.FORWARD) == 2  # a layer each
    assert not peer.of(internal.RunFailed)
    host.link.close()
    peer.socket.close()

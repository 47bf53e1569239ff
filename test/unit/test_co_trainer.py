"""The scheduler's trainer over the real link, with a small peer that speaks the service's side.

The host holds a transformers model in place of SGLang's; training, link, snapshots and shared memory are
the real ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_harli.config import HarliOptions
from sglang_harli.core import StepLoad, make_ipc_dir, scheduler_endpoint, shm_dir
from sglang_harli.managers import qos_policy
from sglang_harli.managers.co_trainer import CoTrainer
from sglang_harli.managers.quantum_clock import HostClock
from sglang_harli.managers.quantum_costs import QuantumCosts
from sglang_harli.managers.service_link import ServiceLink
from sglang_harli.managers.serving_side import ServingSide
from sglang_harli.managers.slo_ledger import UNBOUNDED
from sglang_harli.peft_trainer import frozen_base
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import ALL_LINEAR, Hyperparameters
from sglang_harli.protocol.shared_memory import Slot, remove_stale

VOCAB = 97


class Peer:
    """The service's side of the wire: sends what a test says, keeps what comes."""

    def __init__(self, run_dir: str, pid: int = 1) -> None:
        make_ipc_dir(run_dir)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(scheduler_endpoint(run_dir))
        self.pid = pid
        self.got: list[internal.Message] = []

    def send(self, message: internal.Message, *frames: bytes) -> None:
        self.socket.send_multipart([internal.encode(message), *frames])

    def pump(self) -> None:
        while self.socket.poll(0):
            message = internal.decode(self.socket.recv_multipart()[0], "scheduler")
            self.got.append(message)
            if isinstance(message, internal.Hello):
                self.send(internal.Welcome(pid=self.pid, answers=message.seq))

    def of(self, kind: type) -> list:
        return [m for m in self.got if isinstance(m, kind)]


class Host:
    """What the scheduler does around a CoTrainer, without serving."""

    def __init__(self, run_dir: str, *, quantum_rows: int | None = 1) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
        )
        self.base = frozen_base.from_transformers(LlamaForCausalLM(config).float())
        self.limits = internal.ServedLimits(
            architecture="LlamaForCausalLM",
            model_path="m",
            tokenizer_path="m",
            served_model_name="m",
            dtype="float32",
            device="cpu",
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            linear_sizes=self.base.linear_sizes(),
            max_seq_length=64,
            max_lora_rank=32,
            lora_target_modules=ALL_LINEAR,
            train_memory_bytes=1 << 30,
            logits_bytes=1 << 20,
        )
        self.side = ServingSide(HarliOptions(run_dir=run_dir))
        self.link = ServiceLink(scheduler_endpoint(run_dir), self.hello)
        self.trainer = CoTrainer(
            self.base,
            self.limits,
            self.link,
            None,
            QuantumCosts(1e-6),
            HostClock(),
            quantum_rows=quantum_rows,
            set_options=self.side.set_options,
            status=self.side.status,
        )

    def hello(self) -> internal.Hello:
        return internal.Hello(pid=7, rank=0, limits=self.limits)

    def turn(self) -> bool:
        """One turn of an idle loop; whether a quantum ran."""
        self.trainer.poll()
        offer = self.trainer.offer()
        if offer is None:
            return False
        decision = qos_policy.decide(StepLoad(), UNBOUNDED, offer, self.side.targets)
        self.trainer.run_quantum(offer, decision)
        return True


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "runs")
    yield path
    remove_stale(shm_dir(path))
    if shm_dir(path).exists():
        shm_dir(path).rmdir()


def until(host: Host, peer: Peer, reached: Callable[[], object], *, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, [type(m).__name__ for m in peer.got][-20:]
        if not host.turn():
            host.link.socket.poll(5)
        peer.pump()


def spec(attempt: int = 1, steps: int = 4, **hp: object) -> internal.RunSpec:
    values = {"batch_size": 2, "lora_r": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **hp}
    return internal.RunSpec(
        job="job-1", attempt=attempt, hyperparameters=Hyperparameters(**values), total_steps=steps
    )


def batch(step: int, attempt: int = 1) -> tuple[internal.MicroBatch, bytes, bytes]:
    rng = np.random.default_rng(step)
    lengths = [9, 6]
    ids = rng.integers(0, VOCAB, sum(lengths), dtype=np.int32)
    message = internal.MicroBatch(
        job="job-1",
        attempt=attempt,
        cursor=internal.BatchCursor(epoch=1, step=step, index=0),
        micro_batches=1,
        lengths=lengths,
        rows=[0, 1],
        step_target_tokens=sum(lengths) - len(lengths),
    )
    return message, ids.tobytes(), ids.tobytes()


def give_slot(peer: Peer, run_dir: str, attempt: int = 1) -> Slot:
    started = [m for m in peer.of(internal.RunStarted) if m.attempt == attempt][-1]
    slot = Slot.create(shm_dir(run_dir), started.state_bytes)
    peer.send(internal.SnapshotSlot(job="job-1", attempt=attempt, slot=slot.ref()))
    return slot


def tensors_of(ready: internal.SnapshotReady) -> dict[str, bytes]:
    slot = Slot.open(ready.slot)
    return {ref.name: bytes(slot.view(ref)) for ref in ready.slot.tensors}


def run_to_end(
    run_dir: str, *, pause_at: int | None = None, quantum_rows: int | None = 1
) -> dict[str, bytes]:
    """Train 4 steps, perhaps with a pause and a resume in between; the final snapshot's tensors."""
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
        peer.send(internal.StopRun(job="job-1", attempt=1, snapshot=True))
        until(host, peer, lambda: peer.of(internal.SnapshotReady))
        ready = peer.of(internal.SnapshotReady)[-1]
        assert ready.reason == "pause"
        held = tensors_of(ready)
        peer.send(internal.SnapshotSaved(job="job-1", attempt=1, step=ready.step))
        until(host, peer, lambda: peer.of(internal.RunStopped))
        assert host.trainer.run is None and peer.of(internal.RunStopped)[-1].step == ready.step
        restore = Slot.create(shm_dir(run_dir), ready.slot.nbytes)
        for ref in ready.slot.tensors:
            restore.view(ref)[:] = held[ref.name]
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


def test_a_pause_in_the_middle_of_a_step_changes_no_bit(run_dir):
    straight = run_to_end(run_dir)
    paused = run_to_end(run_dir, pause_at=2)
    assert straight.keys() == paused.keys() and straight
    assert all(straight[name] == paused[name] for name in straight)
    assert any(name.startswith("adapter/base_model.model.") for name in straight)


def test_bad_data_found_late_fails_the_job_and_returns_its_memory(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    message, ids, labels = batch(1)
    wrong = np.frombuffer(ids, dtype=np.int32).copy()
    wrong[0] = VOCAB + 5
    peer.send(message, wrong.tobytes(), labels)
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
    host.link.close()
    peer.socket.close()


class BrokenLoader:
    """An adapter loader whose first slice raises what nobody expected."""

    pending = True

    def run_slice(self) -> None:
        self.pending = False
        raise RuntimeError("not expected")


def test_an_adapter_that_cannot_be_loaded_does_not_fail_the_run_of_another_job(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec()))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    host.trainer.loader = loader = BrokenLoader()
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

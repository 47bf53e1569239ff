"""A host for the scheduler's trainer, and a small peer that speaks the service's side over the real
link."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import zmq
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_harli.architectures import ALL_LINEAR
from sglang_harli.config import HarliOptions
from sglang_harli.core import StepLoad
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.service_link import ServiceLink
from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer
from sglang_harli.managers.scheduler.training.quantum_timer import DeviceQuantumTimer, HostQuantumTimer
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from sglang_harli.peft_trainer.base import base_print, frozen_base
from sglang_harli.peft_trainer.memory.layout import memory_layout
from sglang_harli.protocol import internal
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.protocol.shared_memory import SharedBuffer, remove_stale
from sglang_harli.run_paths import make_ipc_dir, scheduler_endpoint, shm_dir

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

    def of(self, kind: type, *, repeated: bool = False) -> list:
        """Messages of a kind; those that were sent again, since nobody acknowledged them here, once
        unless asked for."""
        found = [m for m in self.got if isinstance(m, kind)]
        first = {m.seq: n for n, m in reversed(list(enumerate(found)))}
        return [m for n, m in enumerate(found) if repeated or first[m.seq] == n]


class Host:
    """What the scheduler does around a CoTrainer, without serving."""

    def __init__(
        self,
        run_dir: str,
        *,
        quantum_rows: int | None = 1,
        pool: UnifiedPool | None = None,
        options: HarliOptions | None = None,
        timer: HostQuantumTimer | DeviceQuantumTimer | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
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
        self.pressure = MemoryPressure(pool, torch.device("cpu"), fixed_bytes=1 << 30)
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
            train_memory_bytes=self.pressure.ever_bytes,
            logits_bytes=1 << 20,
            layout=memory_layout(self.base, 1 << 20),
            space_bytes=self.pressure.space_bytes,
        )
        self.side = ServingState(options or HarliOptions(run_dir=run_dir), memory=self.pressure)
        self.trainer = CoTrainer(
            self.base,
            self.limits,
            functools.partial(ServiceLink, scheduler_endpoint(run_dir)),
            None,
            self.side.predictor,
            HostQuantumTimer() if timer is None else timer,
            self.pressure,
            quantum_rows=quantum_rows,
            take_print=lambda: base_print.take(self.base, "m", "m"),
            make_hello=lambda: internal.Hello(pid=7, rank=0, limits=None),
            set_options=self.side.set_options,
            status=self.side.status,
            now=now,
        )
        self.link = self.trainer.link

    def turn(self) -> bool:
        """One turn of an idle loop; whether a quantum ran."""
        self.trainer.poll()
        self.trainer.tick(idle=True)
        chosen = self.trainer.slotting.next_idle(StepLoad, self.side.targets)
        if chosen is None:
            return False
        self.trainer.run_quantum(*chosen)
        return True


def temporary_run_dir(tmp_path: Path) -> Iterator[str]:
    """A run directory; what is left in shared memory goes at the end."""
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
            host.link.wait(0.005)
        peer.pump()


def spec(attempt: int = 1, steps: int = 4, **hp: object) -> internal.RunSpec:
    values = {"batch_size": 2, "lora_r": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **hp}
    return internal.RunSpec(
        job="job-1", attempt=attempt, hyperparameters=Hyperparameters(**values), total_steps=steps
    )


def batch(
    step: int, attempt: int = 1, lengths: Sequence[int] = (9, 6)
) -> tuple[internal.MicroBatch, bytes, bytes, bytes]:
    rng = np.random.default_rng(step)
    ids = rng.integers(0, VOCAB, sum(lengths), dtype=np.int32)
    message = internal.MicroBatch(
        job="job-1",
        attempt=attempt,
        cursor=internal.BatchCursor(epoch=1, step=step, index=0),
        micro_batches=1,
        lengths=list(lengths),
        rows=list(range(len(lengths))),
        step_target_tokens=sum(lengths) - len(lengths),
    )
    message, *arrays = padded(message, ids, ids)
    ids_sent, places, targets = (array.tobytes() for array in arrays)
    return message, ids_sent, places, targets


def give_slot(peer: Peer, run_dir: str, attempt: int = 1) -> SharedBuffer:
    started = [m for m in peer.of(internal.RunStarted) if m.attempt == attempt][-1]
    slot = SharedBuffer.create(shm_dir(run_dir), started.state_bytes)
    peer.send(internal.SnapshotSlot(job="job-1", attempt=attempt, slot=slot.ref()))
    return slot

"""The real finetune service as a process, and the other side of its sockets: what the scheduler and the
HTTP process say to it, over real sockets, with arithmetic instead of a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from sglang_harli import core
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig
from sglang_harli.protocol import internal, shared_memory
from sglang_harli.protocol.public import ALL_LINEAR

KEPT = (
    internal.RunStarted,
    internal.StepDone,
    internal.SnapshotReady,
    internal.RunStopped,
    internal.RunFailed,
)


class ServiceProcess:
    """``python -m sglang_harli.service.app`` on a run directory; kill it and start it again at will."""

    def __init__(self, run_dir: Path, model: Path, port: int, **options: Any) -> None:
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.run_dir = run_dir
        self.config = ServiceConfig(
            options=HarliOptions(run_dir=str(run_dir), finetune_endpoint=self.endpoint, **options),
            model_path=str(model),
            tokenizer_path=str(model),
            served_model_name="org/tiny",
        )
        self.log = run_dir / "service.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ServiceProcess:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sglang_harli.service.app"],
                env={**os.environ, SERVICE_ENV: self.config.to_json()},
                stderr=log,
            )
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(20)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def limits(**changes: Any) -> internal.ServedLimits:
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_path": "org/tiny",
        "tokenizer_path": "org/tiny",
        "served_model_name": "org/tiny",
        "dtype": "float32",
        "device": "cpu",
        "vocab_size": 400,
        "hidden_size": 64,
        "num_layers": 2,
        "linear_sizes": {name: (64, 64) for name in ALL_LINEAR},
        "max_seq_length": 128,
        "max_lora_rank": 16,
        "lora_target_modules": ALL_LINEAR,
        "train_memory_bytes": 1 << 30,
        "logits_bytes": 1 << 20,
    }
    return internal.ServedLimits(**(values | changes))


class Peer:
    """One connected DEALER socket, served by a thread."""

    def __init__(self, endpoint: str, source: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1),
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, 50),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
        ):
            self.socket.setsockopt(option, value)
        self.socket.connect(endpoint)
        self._source = source
        self._seq = 0
        self.service_pid: int | None = None
        self._hello_at = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Any:
        self._thread.start()
        return self

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self.socket.close()
        self._context.term()

    def _send(self, message: internal.Message) -> None:
        self._seq += 1
        message.seq = self._seq
        self._send_now(message)

    def _send_now(self, message: internal.Message) -> None:
        try:
            self.socket.send(internal.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            pass

    def _run(self) -> None:
        while not self._ending.is_set():
            if self.service_pid is None and time.monotonic() - self._hello_at > 0.2:
                self._hello()
            if self.socket.poll(2):
                header, *frames = self.socket.recv_multipart()
                self.take(internal.decode(header, self._source), frames)
            self.turn()

    def _hello(self) -> None:
        self._hello_at = time.monotonic()
        self._send(self.hello())

    def hello(self) -> internal.Message:
        raise NotImplementedError

    def take(self, message: Any, frames: list[bytes]) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        pass


class SchedulerPeer(Peer):
    """Trains by arithmetic: the state after a step is a function of the one before and of what was fed, so
    that two runs end equal only if they were fed the same rows in the same order.

    Attributes:
        step_s: how long a step takes; ``hold`` (an event) stops training altogether while it is cleared.
        fed: (job, attempt, epoch, step, index) of each micro-batch, in order of arrival.
        fail_at: the step at which the run fails, if any.
    """

    def __init__(self, run_dir: Path, *, step_s: float = 0.0, **changes: Any) -> None:
        super().__init__(core.scheduler_endpoint(str(run_dir)), "service")
        self.step_s = step_s
        self.limits: internal.ServedLimits | None = limits(**changes)
        self.refusal: str | None = None
        self.fail_at: int | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.fed: list[tuple[Any, ...]] = []
        self.farthest_ahead = 0
        self.starts: list[internal.StartRun] = []
        self.ring: deque[internal.Message] = deque()
        self.options: dict[str, Any] = {"tpot_slo_ms": 50.0}
        self.revision = 0
        self.pid = os.getpid()
        self._drop()

    # ---- the run
    def _drop(self) -> None:
        self.spec: internal.RunSpec | None = None
        self.step = 0
        self.tokens = 0
        self.state = np.zeros(8, dtype=np.float32)
        self._batches: dict[tuple[int, int], tuple[internal.MicroBatch, list[bytes]]] = {}
        self._slot: internal.SlotRef | None = None
        self._slot_free = False
        self._wanted: str | None = None
        self._stopping = False
        self._saved = 0
        self._next_at = 0.0
        self._last: internal.BatchCursor | None = None

    def restart(self) -> None:
        """As if the scheduler process had died and come back."""
        self._drop()
        self.ring.clear()
        self.pid += 1
        self.service_pid = None

    def keep(self, message: internal.Message) -> None:
        self._seq += 1
        message.seq = self._seq
        self.ring.append(message)
        if self.service_pid is not None:
            self._send_now(message)

    def hello(self) -> internal.Hello:
        spec = self.spec
        steps = [key for key in self._batches if key[0] > self.step]
        cursor = None
        if spec is not None and steps:
            step, index = max(steps)
            batch = self._batches[step, index][0]
            last = index + 1 == batch.micro_batches
            cursor = internal.BatchCursor(
                epoch=batch.cursor.epoch, step=step + last, index=0 if last else index + 1
            )
        return internal.Hello(
            pid=self.pid,
            rank=0,
            limits=self.limits,
            refusal=self.refusal,
            job=spec.job if spec else None,
            attempt=spec.attempt if spec else 0,
            step=self.step,
            next_cursor=cursor,
            options=self.options,
            revision=self.revision,
        )

    def take(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, internal.Welcome):
            if message.pid != self.service_pid:
                again, self.service_pid = self.service_pid is not None, message.pid
                if again:
                    self._hello()
                for kept in list(self.ring):
                    self._send_now(kept)
        elif isinstance(message, internal.Ack):
            while self.ring and self.ring[0].seq <= message.upto:
                self.ring.popleft()
        elif isinstance(message, internal.StartRun):
            self._start(message)
        elif isinstance(message, internal.StatusRequest):
            report = internal.StatusReport(
                request=message.request, serving={"running": 0}, training={"step": self.step}
            )
            self._send(report)
        elif isinstance(message, internal.SetOptions):
            self._set(message)
        elif isinstance(message, internal.StopRun):
            self._stop(message)
        elif self.spec is not None and (message.job, message.attempt) == (self.spec.job, self.spec.attempt):
            self._of_run(message, frames)

    def _start(self, message: internal.StartRun) -> None:
        self._drop()
        self.starts.append(message)
        self.spec, self.step, self._saved = message.spec, message.step, message.step
        if message.restore is not None:
            slot = shared_memory.Slot.open(message.restore)
            [ref] = [t for t in message.restore.tensors if t.name.startswith("adapter/")]
            self.state = np.frombuffer(slot.view(ref), dtype=np.float32).copy()
            self.tokens = message.meta["tokens"]
            slot.close()
        started = internal.RunStarted(
            job=self.spec.job, attempt=self.spec.attempt, step=self.step, state_bytes=4096
        )
        self.keep(started)

    def _set(self, message: internal.SetOptions) -> None:
        stale = message.if_revision not in (None, self.revision)
        if not stale:
            self.options |= message.values
            self.revision += 1
        self._send(
            internal.OptionsSet(
                request=message.request,
                outcome="stale" if stale else "applied",
                revision=self.revision,
                effective=self.options,
            )
        )

    def _stop(self, message: internal.StopRun) -> None:
        if self.spec is None or message.job != self.spec.job:
            self.keep(internal.RunStopped(job=message.job, attempt=message.attempt, step=0))
            return
        self._stopping = True
        if message.snapshot and self.step > self._saved:
            self._wanted = "pause"
        else:
            self._stopped()

    def _stopped(self) -> None:
        assert self.spec is not None
        self.keep(internal.RunStopped(job=self.spec.job, attempt=self.spec.attempt, step=self.step))
        self._drop()

    def _of_run(self, message: Any, frames: list[bytes]) -> None:
        assert self.spec is not None
        if isinstance(message, internal.MicroBatch):
            cursor = message.cursor
            self.fed.append((message.job, message.attempt, cursor.epoch, cursor.step, cursor.index))
            self._batches[cursor.step, cursor.index] = (message, frames)
            self.farthest_ahead = max(self.farthest_ahead, cursor.step - self.step)
        elif isinstance(message, internal.SnapshotSlot):
            if self._slot is None:
                self._slot, self._slot_free = message.slot, True
        elif isinstance(message, internal.SnapshotSaved):
            self._slot_free = True
            if message.ok:
                self._saved = max(self._saved, message.step)
            if self._stopping:
                self._stopped()
            elif message.step == self.spec.total_steps:
                self._drop()

    def turn(self) -> None:
        if self.spec is None:
            return
        if self._wanted is not None:
            self._snapshot()
            return
        ready = self._batches.get((self.step + 1, 0))
        waiting = self._stopping or not self.hold.is_set() or time.monotonic() < self._next_at
        if waiting or ready is None or self.step >= self.spec.total_steps:
            return
        if all((self.step + 1, i) in self._batches for i in range(ready[0].micro_batches)):
            self._one_step(ready[0].micro_batches)

    def _one_step(self, count: int) -> None:
        assert self.spec is not None
        self.step += 1
        if self.step == self.fail_at:
            failed = internal.RunFailed(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                code="out_of_memory",
                message="training ran out of memory: lower batch_size",
            )
            self.keep(failed)
            self._drop()
            return
        targets, tokens, epoch = 0, 0, 0
        for index in range(count):
            batch, (ids, labels) = self._batches.pop((self.step, index))
            flat, marks = np.frombuffer(ids, dtype=np.int32), np.frombuffer(labels, dtype=np.int32)
            assert len(flat) == len(marks) == sum(batch.lengths)
            starts = np.cumsum([0, *batch.lengths[:-1]])
            marks = marks.copy()
            marks[starts] = -100
            targets += int((marks != -100).sum())
            tokens += len(flat)
            epoch = batch.cursor.epoch
            weight = np.arange(1, len(flat) + 1) @ flat.astype(np.float64)
            self.state = (self.state * np.float32(0.9) + np.float32(weight % 1013)).astype(np.float32)
            assert batch.step_target_tokens > 0
        assert targets == batch.step_target_tokens
        self.tokens += tokens
        self._next_at = time.monotonic() + self.step_s
        self.keep(
            internal.StepDone(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                epoch=epoch,
                loss=4.0 / self.step,
                learning_rate=1e-3,
                grad_norm=1.0,
                tokens=tokens,
                target_tokens=targets,
                seconds=max(self.step_s, 1e-3),
            )
        )
        every = self.spec.hyperparameters.checkpoint_every
        if self.step == self.spec.total_steps:
            self._wanted = "final"
        elif every and self.step % every == 0 and self._slot_free:
            self._wanted = "every"

    def _snapshot(self) -> None:
        if not self._slot_free or self._slot is None or self.spec is None:
            return
        names = [f"{kind}/base_model.model.x.lora_A.weight" for kind in ("adapter", "exp_avg", "exp_avg_sq")]
        refs, _ = shared_memory.layout((name, "float32", (2, 4), 32) for name in names)
        slot = shared_memory.Slot.open(self._slot)
        for ref in refs:
            slot.view(ref)[:] = self.state.tobytes()
        slot.close()
        reason, self._wanted, self._slot_free = self._wanted or "every", None, False
        self.keep(
            internal.SnapshotReady(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                slot=internal.SlotRef(path=self._slot.path, nbytes=self._slot.nbytes, tensors=refs),
                meta={"tokens": self.tokens, "generator": b"\x00\xff", "big": 2**60},
                reason=reason,
            )
        )


class HttpPeer(Peer):
    """Publishes by noting it down.

    Attributes:
        published: name -> (config, tensors).
        refuse: the next publications that are refused.
        states: every ServiceState that came.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(core.http_endpoint(str(run_dir)), "to_http")
        self.published: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
        self.publications: list[str] = []
        self.refuse = 0
        self.states: list[internal.ServiceState] = []

    def hello(self) -> internal.HttpHello:
        return internal.HttpHello(pid=os.getpid(), served_model_name="org/tiny")

    def want(self, name: str) -> None:
        self._send(internal.AdapterWanted(name=name))

    def take(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, internal.ServiceState):
            if self.service_pid not in (None, message.pid):
                self._hello()
            self.service_pid = message.pid
            self.states.append(message)
            return
        self.publications.append(message.name)
        if self.refuse:
            self.refuse -= 1
            self._send(
                internal.AdapterPublished(
                    job=message.job, name=message.name, ok=False, code="no_room", text="no room for it"
                )
            )
            return
        slot = shared_memory.Slot.open(message.slot)
        tensors = {
            t.name: np.frombuffer(slot.view(t), dtype=t.dtype).reshape(t.shape).copy()
            for t in message.slot.tensors
        }
        slot.close()
        self.published[message.name] = (message.config, tensors)
        self._send(internal.AdapterPublished(job=message.job, name=message.name, ok=True))

"""The real finetune service as a process, and the other side of its sockets: what the scheduler and
the HTTP process say to it, over real sockets, with arithmetic instead of a model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from sglang_harli import run_paths
from sglang_harli.architectures import ALL_LINEAR
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig
from sglang_harli.protocol import internal, shared_memory, tokenizer_state
from sglang_harli.protocol.job_limits import MemoryLayout
from sglang_harli.protocol.tokenizer_state import TokenizerState


class ServiceProcess:
    """``python -m sglang_harli.service.app`` on a run directory; kill it and start it again at
    will."""

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


LAYOUT = MemoryLayout(  # of a base in float32 with two layers
    parameter_bytes=(4, 4, 4, 4),
    accumulated_bytes=4,
    inputs=4,
    input_bytes=4,
    logit_bytes=(4,),
    head_tokens=(1 << 20) // (4 * 400),
)


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
        "linear_sizes": dict.fromkeys(ALL_LINEAR, (64, 64)),
        "max_seq_length": 128,
        "max_lora_rank": 16,
        "lora_target_modules": ALL_LINEAR,
        "train_memory_bytes": 1 << 30,
        "logits_bytes": 1 << 20,
        "layout": LAYOUT,
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
        self._seq = time.monotonic_ns() // 1000  # beyond those of a peer before, as in the scheduler
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
        with contextlib.suppress(zmq.Again):
            self.socket.send(internal.encode(message), zmq.NOBLOCK)

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


class HttpPeer(Peer):
    """Publishes by noting it down.

    Attributes:
        published: name -> (config, tensors).
        refuse: the next publications that are refused.
        tokenizer: what the server's is; None: it has none to hand over.
        states: every ServiceState that came.
        refused: every AdapterRefused.
    """

    def __init__(self, run_dir: Path, tokenizer: TokenizerState | None = None) -> None:
        super().__init__(run_paths.http_endpoint(str(run_dir)), "to_http")
        self._run_dir = run_dir
        self.tokenizer = tokenizer
        self.writes = 0
        if tokenizer is not None:
            self.hand_over()
        self.published: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
        self.publications: list[str] = []
        self.refuse = 0
        self.passing = False  # what a refusal says of itself
        self.states: list[internal.ServiceState] = []
        self.refused: list[internal.AdapterRefused] = []

    def hello(self) -> internal.HttpHello:
        fingerprint = self.tokenizer.fingerprint if self.tokenizer is not None else ""
        return internal.HttpHello(pid=os.getpid(), served_model_name="org/tiny", tokenizer=fingerprint)

    def hand_over(self) -> None:
        assert self.tokenizer is not None
        self.writes += 1
        tokenizer_state.write(self._run_dir, tokenizer_state.encode(self.tokenizer))

    def want(self, name: str) -> None:
        self._send(internal.AdapterWanted(name=name))

    def take(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, internal.ServiceState):
            if self.service_pid not in (None, message.pid):
                self._hello()
            self.service_pid = message.pid
            self.states.append(message)
            if message.tokenizer_lost:
                self.hand_over()
                self._hello()
            return
        if isinstance(message, internal.AdapterRefused):
            self.refused.append(message)
            return
        self.publications.append(message.name)
        if self.refuse:
            self.refuse -= 1
            self._send(
                internal.AdapterPublished(
                    request=message.request,
                    job=message.job,
                    name=message.name,
                    ok=False,
                    code="no_room",
                    text="no room for it",
                    passing=self.passing,
                )
            )
            return
        slot = shared_memory.SharedBuffer.open(message.slot)
        tensors = {
            t.name: np.frombuffer(slot.view(t), dtype=t.dtype).reshape(t.shape).copy()
            for t in message.slot.tensors
        }
        slot.close()
        self.published[message.name] = (message.config, tensors)
        self._send(
            internal.AdapterPublished(request=message.request, job=message.job, name=message.name, ok=True)
        )

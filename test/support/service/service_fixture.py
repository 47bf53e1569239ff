"""A real finetune service with peers and a client, and the raw side of its public wire."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.errors import ConfigError
from sglang_harli.protocol import public
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.protocol.public import Job
from sglang_harli.protocol.tokenizer_state import TokenizerState
from support.service.scheduler_peer import SchedulerPeer
from support.service.service_peers import HttpPeer, ServiceProcess

PORTS = range(31400, 32400)
LONG_S = 30.0


def until(found: Callable[[], Any], what: str, timeout_s: float = LONG_S) -> Any:
    """What ``found`` returns, once it is true."""
    end = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < end, f"{what} did not come within {timeout_s} s"
        time.sleep(0.02)
    return value


def pairs(count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"q {i}"},
                {"role": "assistant", "content": f"a {i * i}"},
            ]
        }
        for i in range(count)
    ]


_CLAIMS: list[socket.socket] = []  # held until this process ends


def free_port() -> int:
    """A TCP port that is free on the loopback address, and that no other test process is given.

    A port is bound only when the service of a test has started: until then a probe of another test
    process would find it free, and its client would speak with the wrong service. So each port is
    claimed by an abstract socket of its number, which the kernel frees with the process.
    """
    for port in random.sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                claim.bind(f"\0sglang-harli-test-port-{port}")
                probe.bind(("127.0.0.1", port))
            except OSError:
                claim.close()
                continue
            _CLAIMS.append(claim)
            return port
    raise AssertionError(f"no free port in {PORTS}")


class ServiceUnderTest:
    """A service on a run directory of its own, its peers and a client."""

    def __init__(self, folder: Path, model: Path, *, peers: bool = True, **options: Any) -> None:
        self._stack = ExitStack()
        self.run_dir = folder / "runs"
        self.model, self.port = model, free_port()
        self.service = ServiceProcess(self.run_dir, model, self.port, **options).start()
        self._stack.callback(self._stop)
        run_paths.make_ipc_dir(str(self.run_dir))
        self.client = self._stack.enter_context(
            FinetuneClient(self.service.endpoint, reconnect_timeout_s=LONG_S)
        )
        self.http: HttpPeer | None = None
        if peers:
            self.join_http()
            self.join_scheduler()

    def join_scheduler(self, *, base: BasePrint | None = None, **limits: Any) -> SchedulerPeer:
        if self.http is None:
            self.greet()
        self.scheduler = SchedulerPeer(self.run_dir, **limits)
        self.scheduler.base = base
        self.scheduler.start()
        self._stack.callback(self.scheduler.close)
        until(lambda: self.scheduler.service_pid, "the welcome")
        return self.scheduler

    def greet(self) -> None:
        """An HTTP process says that it has no tokenizer of its own to hand over, and is gone: jobs
        may start."""
        peer = HttpPeer(self.run_dir).start()
        until(lambda: any(s.greeted_by == os.getpid() for s in peer.states), "the answer to the hello")
        peer.close()

    def join_http(self, tokenizer: TokenizerState | None = None) -> HttpPeer:
        self.http = HttpPeer(self.run_dir, tokenizer).start()
        self._stack.callback(self.http.close)
        return self.http

    def _stop(self) -> None:
        if self.service.alive:
            self.service.kill()

    def close(self) -> None:
        self._stack.close()
        for folder in (run_paths.shm_dir(str(self.run_dir)), run_paths.ipc_dir(str(self.run_dir))):
            shutil.rmtree(folder, ignore_errors=True)

    def restart(self) -> None:
        """kill -9 and a new service."""
        self.service.kill()
        self.service.start()

    def folder(self, job: Job) -> Path:
        return self.run_dir / job.id

    def at_step(self, job: Job, step: int) -> Job:
        return until(lambda: (j := self.client.get(job.id)).step >= step and j, f"step {step}")

    def status(self, job: Job, status: str) -> Job:
        return until(lambda: (j := self.client.get(job.id)).status == status and j, status)

    def done(self, job: Job, status: str = "succeeded") -> Job:
        job = self.client.wait(job.id, LONG_S, poll_s=0.05)
        assert job.status == status, job.error
        return job

    def result(self, job: Job) -> np.ndarray:
        """The published tensor: what the run was fed, in which order."""
        assert job.fine_tuned_model is not None
        assert self.http is not None
        _, tensors = self.http.published[job.fine_tuned_model]
        [tensor] = tensors.values()
        return tensor


# ------------------------------------------------------------------ the raw wire
def dealer(rig: ServiceUnderTest, **options: int) -> tuple[zmq.Context, zmq.Socket]:
    context = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        client.setsockopt(getattr(zmq, name), value)
    client.connect(rig.service.endpoint)
    return context, client


def request(verb: str, args: Any, number: str = "1") -> bytes:
    return json.dumps({"v": 1, "id": number, "verb": verb, "args": args}).encode()


def submit_args(content: bytes) -> dict[str, Any]:
    return {"filename": "f", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def exchange(rig: ServiceUnderTest, verb: str, args: Any, *frames: bytes) -> Any:
    """One raw request; a refusal as ConfigError."""
    context, client = dealer(rig, RCVTIMEO=10_000)
    client.send_multipart([request(verb, args), *frames])
    reply = public.decode(client.recv(), public.Reply)
    client.close()
    context.term()
    if reply.error is not None:
        raise ConfigError(reply.error.message, code=reply.error.code)
    return reply.result

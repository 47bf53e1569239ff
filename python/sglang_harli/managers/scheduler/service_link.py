"""The scheduler's end of the ipc pair to the finetune service (docs/internals/run-protocol.md).

Nothing here blocks: ``poll`` takes what has come, ``send`` queues. What the service must not miss
stays in a bounded ring until acknowledged; it is sent again when a restarted service says Welcome,
or when nothing was acknowledged for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from sglang_harli.managers.scheduler.unacknowledged import KEPT, RING, Unacknowledged
from sglang_harli.protocol import internal

logger = logging.getLogger(__name__)

HELLO_EVERY_S = 1.0
MAX_PER_POLL = 16  # messages taken per loop turn: bounds the turn


def has_arrived(socket: Any) -> bool:
    """Whether a message waits on a socket, without taking it (about a microsecond)."""
    return bool(socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)


class ServiceLink:
    """One DEALER socket, connected for the life of the process.

    Where it cannot be opened (no descriptor is left), that is logged and tried again each second;
    ``socket`` is None until then, and there is nothing to train.

    Args:
        endpoint: run_paths.scheduler_endpoint(run_dir).
        make_hello: builds the hello of this moment (limits, run in progress, options).
    """

    def __init__(self, endpoint: str, make_hello: Callable[[], internal.Hello]) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self.socket: zmq.Socket[bytes] | None = None
        self._trouble = ""  # that was logged last
        self._make_hello = make_hello
        # Beyond those of earlier schedulers, whose late acknowledgements must not count here.
        self._seq = self._before = time.monotonic_ns() // 1000
        self._ring = Unacknowledged()
        self.service_pid: int | None = None
        self._hello_at = 0.0
        self._open()

    def _open(self) -> None:
        socket = None
        try:
            if self._context is None:
                self._context = zmq.Context(io_threads=1)
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            socket.setsockopt(zmq.SNDHWM, 2 * RING)
            socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a service that is away
            socket.connect(self._endpoint)
            self.socket = socket
        except zmq.ZMQError as error:
            if socket is not None:
                socket.close(0)
            if self._trouble != str(error):
                self._trouble = str(error)
                logger.error("harli: no link to the finetune service (%s): serving goes on without it", error)

    # ---------------------------------------------------------------- out
    def send(self, message: internal.Message) -> None:
        """Queue a message; kept until acknowledged if it is of the KEPT kinds."""
        self._seq += 1
        message.seq = self._seq
        if isinstance(message, KEPT):
            self._ring.keep(message, time.monotonic())
        if self.service_pid is not None:
            self._send_now(message)

    def _send_now(self, message: internal.Message) -> bool:
        if self.socket is None:
            return False
        try:
            self.socket.send(internal.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # away: the ring has what matters
            return False
        return True

    def keeps(self, message: internal.Message) -> bool:
        """Whether a message that was sent is not acknowledged yet."""
        return message in self._ring

    def say_hello(self) -> None:
        """Also where something that it says has changed."""
        self._hello_at = time.monotonic()
        if self.socket is None:
            self._open()
        hello = self._make_hello()
        self._seq += 1
        hello.seq = self._seq
        self._send_now(hello)

    # ---------------------------------------------------------------- in
    def poll(self, most_batches: int = MAX_PER_POLL) -> list[tuple[internal.Message, list[memoryview]]]:
        """Messages that have come, with their raw frames; cheap where there are none.

        Of micro-batches at most ``most_batches``; what is behind the last comes with the next call.
        """
        if self.service_pid is None:
            if time.monotonic() - self._hello_at >= HELLO_EVERY_S:
                self.say_hello()
        elif len(self._ring):
            for kept in self._ring.due(time.monotonic()):
                self._send_now(kept)
        if self.socket is None or not has_arrived(self.socket):
            return []
        messages = []
        for _ in range(MAX_PER_POLL):
            try:
                header, *frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            try:
                message = internal.decode(header.buffer, "service")
            except msgspec.MsgspecError as error:
                logger.error("harli: dropped a message of the finetune service: %s", error)
                continue
            if isinstance(message, internal.Welcome):
                self._welcomed(message)
            elif isinstance(message, internal.Ack):
                self._ring.acknowledged(message.seqs, time.monotonic())
            else:
                messages.append((message, [frame.buffer for frame in frames]))
                most_batches -= isinstance(message, internal.MicroBatch)
                if most_batches <= 0:
                    break
        return messages

    def _welcomed(self, message: internal.Welcome) -> None:
        if 0 < message.answers <= self._before:  # to an earlier scheduler's hello: ours is unread
            return
        new, asked = message.pid != self.service_pid, message.answers == 0
        self.service_pid = message.pid
        if not new and not asked:
            return
        # Kept messages first: "no run is held" must not overtake the news of how the run ended.
        for kept in self._ring.all():
            self._send_now(kept)
        if asked:
            self.say_hello()

    @property
    def unacknowledged(self) -> int:
        return len(self._ring)

    def wait(self, seconds: float) -> None:
        """Return when a message has come, or after so many seconds."""
        if self.socket is None:
            time.sleep(seconds)
        else:
            self.socket.poll(int(seconds * 1000))

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        if self._context is not None:
            self._context.term()

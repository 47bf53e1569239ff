"""The finetune client: submit jobs to a running server and follow them, over ZMQ (docs/jobs.md).

    from sglang_harli import FinetuneClient

    with FinetuneClient("tcp://127.0.0.1:30100") as client:
        job = client.submit("pairs.jsonl", suffix="support", n_epochs=3)
        job = client.wait(job.id)
        print(job.status, job.fine_tuned_model)

Each call has a socket of its own, so that one client may serve several threads or tasks.  What a call
says is written once, in ``protocol.calls``; the clients here only carry it out, blocking or in asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from sglang_harli.config import DEFAULT_ENDPOINT, ENDPOINT_ENV, parse_live
from sglang_harli.errors import ConfigError
from sglang_harli.protocol.calls import CONNECT_TIMEOUT_S, REPLY_TIMEOUT_S, Calls, Data, Steps, T
from sglang_harli.protocol.public import Event, Job, SetAnswer, StatusAnswer

LINGER_MS = 200


class _Wire:
    """A DEALER socket and its monitor.  ``IMMEDIATE``: nothing is queued for a peer that is not there."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, poller: Any) -> None:
        self._context, self._endpoint, self.poller = context, endpoint, poller
        self._socket: Any = None
        self._monitor: Any = None
        self._lost = False

    def open(self) -> None:
        self.close()
        self._lost = False
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1),
            (zmq.LINGER, LINGER_MS),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 20_000),
        ):
            self._socket.setsockopt(option, value)
        wanted = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        self._monitor = self._socket.get_monitor_socket(wanted)
        self.poller.register(self._socket, zmq.POLLIN)
        self.poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"endpoint {self._endpoint!r} is not accepted ({error.strerror}): give tcp://127.0.0.1:PORT or "
                "ipc://PATH",
                param="endpoint",
            ) from error

    def send(self, frames: Sequence[Any]) -> None:
        self._socket.getsockopt(zmq.EVENTS)  # libzmq takes note of what its other thread did, as in read()
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._lost = True  # the peer has just gone

    def read(self) -> tuple[str, Any]:
        """What there is, without waiting; an answer comes before the news that the peer left after it."""
        event = None
        if not self._lost:
            with contextlib.suppress(zmq.Again):
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
        self._lost = self._lost or event == zmq.Event.DISCONNECTED
        self._socket.getsockopt(zmq.EVENTS)
        try:
            return "message", self._socket.recv_multipart(zmq.NOBLOCK)[0]
        except zmq.Again:
            pass
        if self._lost:
            self._lost = False
            return "lost", None
        return ("nothing" if event is None else "connected"), None

    def close(self) -> None:
        if self._socket is not None:
            self.poller.unregister(self._socket)
            self.poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
            self._socket = self._monitor = None


class _SyncWire(_Wire):
    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, endpoint, zmq.Poller())

    def do(self, operation: str, argument: Any) -> Any:
        if operation == "open":
            return self.open()
        if operation == "send":
            return self.send(argument)
        if operation == "wait":
            if not self._lost:
                self.poller.poll(argument * 1000)
            return self.read()
        return time.sleep(argument)  # between two looks at the job (`wait`)


class _AsyncWire(_Wire):
    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, endpoint, zmq.asyncio.Poller())

    async def do(self, operation: str, argument: Any) -> Any:
        if operation == "open":
            return self.open()
        if operation == "send":
            return self.send(argument)
        if operation == "wait":
            if not self._lost:
                await self.poller.poll(argument * 1000)
            return self.read()
        return await asyncio.sleep(argument)


class _Client:
    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self.endpoint = endpoint or os.environ.get(ENDPOINT_ENV) or DEFAULT_ENDPOINT
        self._calls = Calls(self.endpoint, connect_timeout_s, reply_timeout_s)
        self._context: zmq.Context[Any] = zmq.Context()


class FinetuneClient(_Client):
    """Submits and follows finetune jobs; blocks until each call is answered.

    Args:
        endpoint: the server's ``--harli-finetune-endpoint``; default: the environment variable
            ``HARLI_ENDPOINT``, else ``tcp://127.0.0.1:30100``.
        connect_timeout_s: how long a call tries to connect, and to reconnect after a loss.
        reply_timeout_s: how long a connected service may take to answer (a ``submit``: an hour).

    Every method raises NotReadyError where the service cannot be reached in time, and whatever the
    service refuses with as its own type (ConfigError, DataError with one row per bad line in
    ``details``, NotFoundError, StateError, UnsupportedError, ...; all are HarliError).
    """

    def __enter__(self) -> FinetuneClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; the client cannot be used afterwards."""
        self._context.term()

    def submit(
        self,
        data: Data,
        *,
        suffix: str | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
        **hyperparameters: Any,
    ) -> Job:
        """Create a job from training data; the job is durable when this returns.

        Args:
            data: path of a JSONL file, its bytes, or an iterable of rows (``{"messages": [...]}`` or
                ``{"prompt": ..., "completion": ...}``).
            suffix: goes into the adapter's name.
            filename: how the job calls the data; default: the path's name.
            idempotency_key: a repeated submit with the same key returns the same job (default: a
                new key; retries within one call share it).
            hyperparameters: see ``protocol.public.Hyperparameters``.

        Raises:
            DataError: the file cannot be read, or lines are at fault; no job was created.
            ConfigError: a hyperparameter or the suffix is not accepted.
        """
        return self._run(
            self._calls.submit(
                data, suffix=suffix, filename=filename, key=idempotency_key, pairs=hyperparameters
            )
        )

    def list(self, *, status: str | None = None, limit: int = 100, after: str | None = None) -> list[Job]:
        """Jobs of this server; ``after`` is the id of the last one seen."""
        return self._run(self._calls.jobs(status, limit, after))

    def get(self, job: str) -> Job:
        """The job with this id."""
        return self._run(self._calls.job("get", job))

    def find(self, name: str) -> Job:
        """The job named by its id, short id, the beginning of its id, suffix or adapter name.

        Raises:
            ConfigError: several jobs fit.
            NotFoundError: none does.
        """
        return self._run(self._calls.find(name))

    def events(self, job: str, after: int = 0, *, follow: bool = False) -> Iterator[Event]:
        """Events with an id above ``after``; with ``follow`` also those to come, until the job is over."""
        steps = self._calls.events(job, after, follow)
        wire = _SyncWire(self._context, self.endpoint)
        try:
            operation, argument = next(steps)
            while True:
                if operation == "emit":
                    yield argument
                    answer = None
                else:
                    answer = wire.do(operation, argument)
                operation, argument = steps.send(answer)
        except StopIteration:
            return
        finally:
            wire.close()

    def pause(self, job: str) -> Job:
        """Pause a queued or running job; its state is saved."""
        return self._run(self._calls.job("pause", job))

    def resume(self, job: str) -> Job:
        """Queue a paused job again."""
        return self._run(self._calls.job("resume", job))

    def cancel(self, job: str) -> Job:
        """End a job for good."""
        return self._run(self._calls.job("cancel", job))

    def status(self) -> StatusAnswer:
        """The service, serving and training as the scheduler sees them, and the queue."""
        return self._run(self._calls.status())

    def set(self, *, if_revision: int | None = None, **values: float | None) -> SetAnswer:
        """Change latency targets and caps, in milliseconds, for example ``tpot_slo_ms=40``; None clears one.

        Raises:
            ConfigError: unknown name or a value out of bounds.
        """
        return self._run(self._calls.set(_live(values), if_revision))

    def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        """The job once it has succeeded, failed or been cancelled.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
        """
        return self._run(self._calls.wait(job, timeout_s, poll_s))

    def _run(self, steps: Steps[T]) -> T:
        wire = _SyncWire(self._context, self.endpoint)
        try:
            operation, argument = next(steps)
            while True:
                operation, argument = steps.send(wire.do(operation, argument))
        except StopIteration as stop:
            return stop.value
        finally:
            wire.close()


class AsyncFinetuneClient(_Client):
    """``FinetuneClient`` for asyncio: the same methods and errors, awaited; ``events`` is an async iterator."""

    async def __aenter__(self) -> AsyncFinetuneClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; the client cannot be used afterwards."""
        self._context.term()

    async def submit(
        self,
        data: Data,
        *,
        suffix: str | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
        **hyperparameters: Any,
    ) -> Job:
        return await self._run(
            self._calls.submit(
                data, suffix=suffix, filename=filename, key=idempotency_key, pairs=hyperparameters
            )
        )

    async def list(
        self, *, status: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[Job]:
        return await self._run(self._calls.jobs(status, limit, after))

    async def get(self, job: str) -> Job:
        return await self._run(self._calls.job("get", job))

    async def find(self, name: str) -> Job:
        return await self._run(self._calls.find(name))

    async def events(self, job: str, after: int = 0, *, follow: bool = False) -> AsyncIterator[Event]:
        steps = self._calls.events(job, after, follow)
        wire = _AsyncWire(self._context, self.endpoint)
        try:
            operation, argument = next(steps)
            while True:
                if operation == "emit":
                    yield argument
                    answer = None
                else:
                    answer = await wire.do(operation, argument)
                operation, argument = steps.send(answer)
        except StopIteration:
            return
        finally:
            wire.close()

    async def pause(self, job: str) -> Job:
        return await self._run(self._calls.job("pause", job))

    async def resume(self, job: str) -> Job:
        return await self._run(self._calls.job("resume", job))

    async def cancel(self, job: str) -> Job:
        return await self._run(self._calls.job("cancel", job))

    async def status(self) -> StatusAnswer:
        return await self._run(self._calls.status())

    async def set(self, *, if_revision: int | None = None, **values: float | None) -> SetAnswer:
        return await self._run(self._calls.set(_live(values), if_revision))

    async def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        return await self._run(self._calls.wait(job, timeout_s, poll_s))

    async def _run(self, steps: Steps[T]) -> T:
        wire = _AsyncWire(self._context, self.endpoint)
        try:
            operation, argument = next(steps)
            while True:
                operation, argument = steps.send(await wire.do(operation, argument))
        except StopIteration as stop:
            return stop.value
        finally:
            wire.close()


def _live(values: dict[str, float | None]) -> dict[str, float | None]:
    return dict(parse_live(name, "none" if value is None else str(value)) for name, value in values.items())

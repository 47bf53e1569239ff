"""The finetune client: submit jobs to a running server and follow them, over ZMQ (docs/jobs.md).

    from sglang_harli import FinetuneClient

    with FinetuneClient("tcp://127.0.0.1:30100") as client:
        job = client.submit("pairs.jsonl", suffix="support", n_epochs=3)
        job = client.wait(job.id)
        print(job.status, job.fine_tuned_model)

Each call has a socket of its own, so that one client may serve several threads or tasks.  What a
call says is written once, in ``client.calls``; the clients here only carry it out, blocking or in
asyncio.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import zmq

from sglang_harli.client.calls import Calls
from sglang_harli.client.data_source import Data
from sglang_harli.client.exchange import CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S, REPLY_TIMEOUT_S, Steps, T
from sglang_harli.client.sockets import AsyncWire, SyncWire, Wire, closed
from sglang_harli.config import CURVE_KEYS_ENV, DEFAULT_ENDPOINT, ENDPOINT_ENV, parse_live
from sglang_harli.protocol.curve_keys import load_client_keys
from sglang_harli.protocol.public import Event, Job, SetAnswer, StatusAnswer

W = TypeVar("W", bound=Wire)


class _Client:
    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
        on_connection: Callable[[str], None] | None = None,
        curve_keys: str | os.PathLike[str] | None = None,
    ) -> None:
        self.endpoint = endpoint or os.environ.get(ENDPOINT_ENV) or DEFAULT_ENDPOINT
        folder = os.fspath(curve_keys) if curve_keys else os.environ.get(CURVE_KEYS_ENV)
        self._keys = load_client_keys(folder) if folder else None
        self._calls = Calls(
            self.endpoint,
            connect_timeout_s,
            reply_timeout_s,
            reconnect_timeout_s,
            notice=on_connection,
            keys=folder,
        )
        self._context: zmq.Context[Any] = zmq.Context()
        self._wires: set[Any] = set()  # of the calls under way, iterators that are kept included
        self._closed = False
        # Also for a client that is forgotten.  It holds context and sockets: left to the garbage
        # collector with the client, the context may be asked to end first, and would wait for its
        # sockets for ever.
        self._end = weakref.finalize(self, _end, self._context, self._wires)
        self._end.atexit = False

    def close(self) -> None:
        """Release the sockets; the client cannot be used afterwards, and calls under way end with
        StateError."""
        self._closed = True
        self._end()

    def _opened(self, wire: W) -> W:
        """A wire that ``close`` knows of."""
        self._wires.add(wire)
        if self._closed:
            self._ended(wire)
            raise closed()
        return wire

    def _ended(self, wire: Any) -> None:
        wire.end()
        self._wires.discard(wire)


def _end(context: zmq.Context[Any], wires: set[Any]) -> None:
    for wire in list(wires):
        wire.end()
    context.term()


class FinetuneClient(_Client):
    """Submits and follows finetune jobs; blocks until each call is answered.

    Args:
        endpoint: the server's ``--harli-finetune-endpoint``; default: the environment variable
            ``HARLI_ENDPOINT``, else ``tcp://127.0.0.1:30100``.
        connect_timeout_s: how long a call tries to connect, and to reconnect after a loss.
        reply_timeout_s: how long a connected service may take to answer (a ``submit``: an hour).
        reconnect_timeout_s: how long ``submit`` and what follows a job (``wait``, ``watch``,
            ``events`` with ``follow``) wait for a service that was reached before and is lost.
        on_connection: called once when such a call loses the connection, and once when it is back.
        curve_keys: folder with ``server.key`` and ``client.key_secret``, where the server asks for
            CURVE keys; default: the environment variable ``HARLI_CURVE_KEYS``, else none.

    Every method raises NotReadyError where the service cannot be reached in time, and whatever the
    service refuses with as its own type (ConfigError, DataError with one row per bad line in
    ``details``, NotFoundError, StateError, UnsupportedError, ...; all are HarliError).
    """

    def __enter__(self) -> FinetuneClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(
        self,
        data: Data | None = None,
        *,
        suffix: str | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        resume_from: str | None = None,
        **hyperparameters: Any,
    ) -> Job:
        """Create a job from training data; the job is durable when this returns.

        Args:
            data: path of a JSONL file, its bytes, or an iterable of rows (``{"messages": [...]}``
                or ``{"prompt": ..., "completion": ...}``).
            suffix: goes into the adapter's name.
            filename: how the job calls the data; default: the path's name.
            idempotency_key: a repeated submit with the same key returns the same job (default: a
                new key; retries within one call share it).
            priority: -100 to 100; higher ones leave the queue first.
            resume_from: id of a job that is over and whose checkpoint this one begins with.
                Without ``data`` its training goes on; with ``data`` its adapter learns from other
                data.
            hyperparameters: see ``protocol.public.Hyperparameters``.

        Raises:
            DataError: the file cannot be read, or lines are at fault; no job was created.
            ConfigError: a hyperparameter or the suffix is not accepted.
        """
        return self._run(
            self._calls.submit(
                data,
                suffix=suffix,
                filename=filename,
                key=idempotency_key,
                pairs=hyperparameters,
                priority=priority,
                resume_from=resume_from,
            )
        )

    def check(self, data: Data, *, filename: str | None = None, **hyperparameters: Any) -> dict[str, Any]:
        """What would become of training data, by the server's own tokenizer and chat template; no
        job is made.

        Args:
            data, filename: see ``submit``.
            hyperparameters: ``max_seq_length`` and ``on_overflow`` count.

        Returns:
            ``ok``, ``rows``, ``notes``, ``bad_lines`` and more (see docs/jobs.md, ``check``).
        """
        return self._run(self._calls.check(data, filename=filename, pairs=hyperparameters))

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
        """Events with an id above ``after``; with ``follow`` also those to come, until the job is
        over."""
        return self._emitted(self._calls.events(job, after, follow))

    def pause(self, job: str) -> Job:
        """Pause a queued or running job; its state is saved."""
        return self._run(self._calls.job("pause", job))

    def resume(self, job: str) -> Job:
        """Queue a paused job again."""
        return self._run(self._calls.job("resume", job))

    def cancel(self, job: str) -> Job:
        """End a job for good."""
        return self._run(self._calls.job("cancel", job))

    def prioritize(self, job: str, priority: int) -> Job:
        """Change the priority (-100 to 100) of a job that is not over; a running one is not
        preempted."""
        return self._run(self._calls.prioritize(job, priority))

    def status(self) -> StatusAnswer:
        """The service, serving and training as the scheduler sees them, and the queue."""
        return self._run(self._calls.status())

    def set(self, *, if_revision: int | None = None, **values: float | str | None) -> SetAnswer:
        """Change latency targets and caps, in milliseconds, or ``max_train_mem``, a size: for
        example ``tpot_slo_ms=40, max_train_mem="2GiB"``; None clears one.

        Raises:
            ConfigError: unknown name or a value out of bounds.
        """
        return self._run(self._calls.set(_live(values), if_revision))

    def watch(self, job: str, *, poll_s: float = 0.5) -> Iterator[Job]:
        """The job again and again, ``poll_s`` seconds apart, until it is over."""
        return self._emitted(self._calls.watch(job, poll_s))

    def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        """The job once it has succeeded, failed or been cancelled.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
        """
        return self._run(self._calls.wait(job, timeout_s, poll_s))

    def _emitted(self, steps: Steps[None]) -> Iterator[Any]:
        wire = self._opened(SyncWire(self._context, self.endpoint, self._keys))
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
            self._ended(wire)

    def _run(self, steps: Steps[T]) -> T:
        wire = self._opened(SyncWire(self._context, self.endpoint, self._keys))
        try:
            operation, argument = next(steps)
            while True:
                operation, argument = steps.send(wire.do(operation, argument))
        except StopIteration as stop:
            return stop.value
        finally:
            self._ended(wire)


class AsyncFinetuneClient(_Client):
    """``FinetuneClient`` for asyncio: the same methods and errors, awaited; ``events`` is an async
    iterator."""

    async def __aenter__(self) -> AsyncFinetuneClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def submit(
        self,
        data: Data | None = None,
        *,
        suffix: str | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        resume_from: str | None = None,
        **hyperparameters: Any,
    ) -> Job:
        return await self._run(
            self._calls.submit(
                data,
                suffix=suffix,
                filename=filename,
                key=idempotency_key,
                pairs=hyperparameters,
                priority=priority,
                resume_from=resume_from,
            )
        )

    async def check(
        self, data: Data, *, filename: str | None = None, **hyperparameters: Any
    ) -> dict[str, Any]:
        return await self._run(self._calls.check(data, filename=filename, pairs=hyperparameters))

    async def list(
        self, *, status: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[Job]:
        return await self._run(self._calls.jobs(status, limit, after))

    async def get(self, job: str) -> Job:
        return await self._run(self._calls.job("get", job))

    async def find(self, name: str) -> Job:
        return await self._run(self._calls.find(name))

    def events(self, job: str, after: int = 0, *, follow: bool = False) -> AsyncIterator[Event]:
        return self._emitted(self._calls.events(job, after, follow))

    async def pause(self, job: str) -> Job:
        return await self._run(self._calls.job("pause", job))

    async def resume(self, job: str) -> Job:
        return await self._run(self._calls.job("resume", job))

    async def cancel(self, job: str) -> Job:
        return await self._run(self._calls.job("cancel", job))

    async def prioritize(self, job: str, priority: int) -> Job:
        return await self._run(self._calls.prioritize(job, priority))

    async def status(self) -> StatusAnswer:
        return await self._run(self._calls.status())

    async def set(self, *, if_revision: int | None = None, **values: float | str | None) -> SetAnswer:
        return await self._run(self._calls.set(_live(values), if_revision))

    def watch(self, job: str, *, poll_s: float = 0.5) -> AsyncIterator[Job]:
        return self._emitted(self._calls.watch(job, poll_s))

    async def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        return await self._run(self._calls.wait(job, timeout_s, poll_s))

    async def _emitted(self, steps: Steps[None]) -> AsyncIterator[Any]:
        wire = self._opened(AsyncWire(self._context, self.endpoint, self._keys))
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
            self._ended(wire)

    async def _run(self, steps: Steps[T]) -> T:
        wire = self._opened(AsyncWire(self._context, self.endpoint, self._keys))
        try:
            operation, argument = next(steps)
            while True:
                operation, argument = steps.send(await wire.do(operation, argument))
        except StopIteration as stop:
            return stop.value
        finally:
            self._ended(wire)


def _live(values: dict[str, float | str | None]) -> dict[str, float | str | None]:
    return dict(parse_live(name, "none" if value is None else str(value)) for name, value in values.items())

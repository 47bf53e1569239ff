"""The finetune client: submit jobs to a running server and follow them, over ZMQ (docs/jobs.md).

    from sglang_harli import FinetuneClient

    with FinetuneClient("tcp://127.0.0.1:30100") as client:
        job = client.submit("pairs.jsonl", suffix="support", n_epochs=3)
        job = client.wait(job.id)
        print(job.status, job.fine_tuned_model)

The asyncio client does all of it (``async_client``); here it runs on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from sglang_harli.client.async_client import AsyncFinetuneClient, check_args, source_of, submit_args
from sglang_harli.client.connection import closed
from sglang_harli.client.data_source import Data, DataSource
from sglang_harli.client.exchange import CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S, REPLY_TIMEOUT_S
from sglang_harli.errors import StateError
from sglang_harli.protocol.public import Event, Job, SetAnswer, StatusAnswer

T = TypeVar("T")
CLOSE_S = 5.0  # how long ``close`` waits for calls to end
_OVER: Any = object()


class FinetuneClient:
    """Submits and follows finetune jobs; blocks until each call is answered.  It may serve several threads.

    Args:
        endpoint: the server's ``--harli-finetune-endpoint``; default: the environment variable
            ``HARLI_ENDPOINT``, else ``tcp://127.0.0.1:30100``.
        connect_timeout_s: how long a call tries to connect, and to reconnect after a loss.
        reply_timeout_s: how long a connected service may take to answer (a ``submit``: an hour).
        reconnect_timeout_s: how long ``submit`` and what follows a job (``wait``, ``watch``, ``events`` with
            ``follow``) wait for a service that was reached before and is lost.
        on_connection: called once when such a call loses the connection, and once when it is back; in the
            client's own thread.
        curve_keys: folder with ``server.key`` and ``client.key_secret``, where the server asks for CURVE
            keys; default: the environment variable ``HARLI_CURVE_KEYS``, else none.

    Every method raises NotReadyError where the service cannot be reached in time, and whatever the
    service refuses with as its own type (ConfigError, DataError with one row per bad line in
    ``details``, NotFoundError, StateError, UnsupportedError, ...; all are HarliError).
    """

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
        self._client = AsyncFinetuneClient(
            endpoint,
            connect_timeout_s=connect_timeout_s,
            reply_timeout_s=reply_timeout_s,
            reconnect_timeout_s=reconnect_timeout_s,
            on_connection=on_connection,
            curve_keys=curve_keys,
        )
        self.endpoint = self._client.endpoint
        self._loop = _Loop(self._client.close)
        self._forgotten = weakref.finalize(self, self._loop.stop, wait=False)
        self._forgotten.atexit = False

    def __enter__(self) -> FinetuneClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; the client cannot be used afterwards, and calls under way end with StateError."""
        self._loop.stop(wait=True)

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
            data: path of a JSONL file, its bytes, or an iterable of rows (``{"messages": [...]}`` or
                ``{"prompt": ..., "completion": ...}``).
            suffix: goes into the adapter's name.
            filename: how the job calls the data; default: the path's name.
            idempotency_key: a repeated submit with the same key returns the same job (default: a
                new key; retries within one call share it).
            priority: -100 to 100; higher ones leave the queue first.
            resume_from: id of a job that is over and whose checkpoint this one begins with.  Without
                ``data`` its training goes on; with ``data`` its adapter learns from other data.
            hyperparameters: see ``protocol.public.Hyperparameters``.

        Raises:
            DataError: the file cannot be read, or lines are at fault; no job was created.
            ConfigError: a hyperparameter or the suffix is not accepted.
        """
        args = submit_args(data, suffix, filename, idempotency_key, priority, resume_from, hyperparameters)
        with source_of(data) as source:
            return self._loop.run(self._client.send_submit(args, source))

    def check(self, data: Data, *, filename: str | None = None, **hyperparameters: Any) -> dict[str, Any]:
        """What would become of training data, by the server's own tokenizer and chat template; no job is made.

        Args:
            data, filename: see ``submit``.
            hyperparameters: ``max_seq_length`` and ``on_overflow`` count.

        Returns:
            ``ok``, ``rows``, ``notes``, ``bad_lines`` and more (see docs/jobs.md, ``check``).
        """
        args = check_args(filename, hyperparameters)
        with DataSource(data) as source:
            return self._loop.run(self._client.send_check(args, source))

    def list(self, *, status: str | None = None, limit: int = 100, after: str | None = None) -> list[Job]:
        """Jobs of this server; ``after`` is the id of the last one seen."""
        return self._loop.run(self._client.list(status=status, limit=limit, after=after))

    def get(self, job: str) -> Job:
        """The job with this id."""
        return self._loop.run(self._client.get(job))

    def find(self, name: str) -> Job:
        """The job named by its id, short id, the beginning of its id, suffix or adapter name.

        Raises:
            ConfigError: several jobs fit.
            NotFoundError: none does.
        """
        return self._loop.run(self._client.find(name))

    def events(self, job: str, after: int = 0, *, follow: bool = False) -> Iterator[Event]:
        """Events with an id above ``after``; with ``follow`` also those to come, until the job is over."""
        return self._each(self._client.events(job, after, follow=follow))

    def pause(self, job: str) -> Job:
        """Pause a queued or running job; its state is saved."""
        return self._loop.run(self._client.pause(job))

    def resume(self, job: str) -> Job:
        """Queue a paused job again."""
        return self._loop.run(self._client.resume(job))

    def cancel(self, job: str) -> Job:
        """End a job for good."""
        return self._loop.run(self._client.cancel(job))

    def prioritize(self, job: str, priority: int) -> Job:
        """Change the priority (-100 to 100) of a job that is not over; a running one is not preempted."""
        return self._loop.run(self._client.prioritize(job, priority))

    def status(self) -> StatusAnswer:
        """The service, serving and training as the scheduler sees them, and the queue."""
        return self._loop.run(self._client.status())

    def set(self, *, if_revision: int | None = None, **values: float | str | None) -> SetAnswer:
        """Change latency targets and caps, in milliseconds, or ``max_train_mem``, a size: for example
        ``tpot_slo_ms=40, max_train_mem="2GiB"``; None clears one.

        Raises:
            ConfigError: unknown name or a value out of bounds.
        """
        return self._loop.run(self._client.set(if_revision=if_revision, **values))

    def watch(self, job: str, *, poll_s: float = 0.5) -> Iterator[Job]:
        """The job again and again, ``poll_s`` seconds apart, until it is over."""
        return self._each(self._client.watch(job, poll_s=poll_s))

    def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        """The job once it has succeeded, failed or been cancelled.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
        """
        return self._loop.run(self._client.wait(job, timeout_s, poll_s=poll_s))

    def _each(self, found: AsyncIterator[T]) -> Iterator[T]:
        async def step() -> T:
            return await anext(found, _OVER)

        try:
            while (item := self._loop.run(step())) is not _OVER:
                yield item
        finally:
            self._loop.soon(lambda: found.aclose())  # type: ignore[attr-defined]


class _Loop:
    """An event loop in a daemon thread, started with the first call.

    Args:
        end: called in it when it stops: ends the calls under way.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._lock = (
            threading.RLock()
        )  # reentrant: the garbage collector may stop a loop in the midst of anything
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._calling: set[int] = set()  # threads that wait for a call

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a call, which blocks this thread."""
        me = threading.get_ident()
        try:
            loop = self._started()
            if self._thread is threading.current_thread():
                raise StateError(
                    "on_connection is called in the client's own thread: it cannot call the client"
                )
            future = asyncio.run_coroutine_threadsafe(call, loop)
        except BaseException:
            call.close()
            raise
        self._calling.add(me)
        try:
            return future.result()
        except CancelledError:
            raise closed() from None
        except BaseException:
            future.cancel()  # an interrupt of this thread ends the call
            raise
        finally:
            self._calling.discard(me)

    def soon(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something in the loop, and wait for nothing."""

        async def do() -> None:
            with contextlib.suppress(RuntimeError):  # it is at work still: the cancelled call ends it
                await make()

        with self._lock, contextlib.suppress(RuntimeError):  # the loop is closed
            if self._loop is not None and not self._stopped:
                loop = self._loop
                loop.call_soon_threadsafe(lambda: loop.create_task(do()))

    def stop(self, *, wait: bool) -> None:
        """End the calls under way, and the thread; may be repeated.

        Args:
            wait: for the thread, except where this one has a call under way (a signal handler).
        """
        with self._lock:
            first, self._stopped = not self._stopped, True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            if first:
                self._end()
            return
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(loop.stop)
        if wait and threading.get_ident() not in self._calling and thread is not threading.current_thread():
            thread.join(CLOSE_S)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._stopped:
                raise closed()
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = "harli client"
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop, self._end), name=name, daemon=True
                )
                self._thread.start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        end()
        while tasks := asyncio.all_tasks(loop):  # they find their connections ended
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

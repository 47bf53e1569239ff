"""The finetune client that blocks: ``AsyncFinetuneClient`` for code without asyncio.

    from sglang_harli import FinetuneClient

    with FinetuneClient("tcp://127.0.0.1:30100") as client:
        job = client.submit("pairs.jsonl", suffix="support", n_epochs=3)
        job = client.wait(job.id)
        print(job.status, job.fine_tuned_model)

It needs no event loop and no thread: the calls run on wires that block (``sockets.BlockingWire``),
so that their coroutines never suspend and end in one step.  One client may serve several threads,
also one in which an event loop runs (a notebook's).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from sglang_harli.client.async_client import AsyncFinetuneClient
from sglang_harli.client.exchange import CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S, REPLY_TIMEOUT_S
from sglang_harli.client.sockets import BlockingWire, Wire
from sglang_harli.protocol.public import Event, Job

P = ParamSpec("P")
T = TypeVar("T")


class _BlockingCalls(AsyncFinetuneClient):
    _wire_kind: ClassVar[type[Wire]] = BlockingWire


def _result(call: Coroutine[Any, Any, T]) -> T:
    """Of a call that never suspends."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    call.close()
    raise AssertionError("a call on a blocking wire suspended")


def _blocking(
    method: Callable[Concatenate[AsyncFinetuneClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[FinetuneClient, P], T]:
    @functools.wraps(method)
    def call(self: FinetuneClient, *args: P.args, **kwargs: P.kwargs) -> T:
        return _result(method(self._calls, *args, **kwargs))

    return call


def _iterated(calls: AsyncGenerator[T]) -> Iterator[T]:
    try:
        while True:
            with _of_no_loop():
                found = _result(anext(calls))
            yield found
    except StopAsyncIteration:
        return
    finally:
        _result(calls.aclose())


@contextlib.contextmanager
def _of_no_loop() -> Iterator[None]:
    """Keeps async generators begun within from this thread's event loop, which would close them at
    its end."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*hooks)


class FinetuneClient:
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

    Every method raises NotReadyError where the service cannot be reached in time, StateError once
    the client is closed, and what the service refuses with as its own type (ConfigError, DataError
    with one row per bad line in ``details``, NotFoundError, ...; all are HarliError).
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
        self._calls = _BlockingCalls(
            endpoint,
            connect_timeout_s=connect_timeout_s,
            reply_timeout_s=reply_timeout_s,
            reconnect_timeout_s=reconnect_timeout_s,
            on_connection=on_connection,
            curve_keys=curve_keys,
        )
        self.endpoint = self._calls.endpoint

    def close(self) -> None:
        """Release the sockets for good: calls under way end with StateError."""
        self._calls.close()

    def __enter__(self) -> FinetuneClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    submit = _blocking(AsyncFinetuneClient.submit)
    check = _blocking(AsyncFinetuneClient.check)
    list = _blocking(AsyncFinetuneClient.list)
    get = _blocking(AsyncFinetuneClient.get)
    find = _blocking(AsyncFinetuneClient.find)
    pause = _blocking(AsyncFinetuneClient.pause)
    resume = _blocking(AsyncFinetuneClient.resume)
    cancel = _blocking(AsyncFinetuneClient.cancel)
    prioritize = _blocking(AsyncFinetuneClient.prioritize)
    status = _blocking(AsyncFinetuneClient.status)
    set = _blocking(AsyncFinetuneClient.set)
    wait = _blocking(AsyncFinetuneClient.wait)

    def events(self, job: str, after: int = 0, *, follow: bool = False) -> Iterator[Event]:
        """Events with an id above ``after``, each once; with ``follow`` also those to come, until
        the job is over, across reconnections."""
        return _iterated(self._calls.events(job, after, follow=follow))

    def watch(self, job: str, *, poll_s: float = 0.5) -> Iterator[Job]:
        """The job again and again, ``poll_s`` seconds apart, until it is over."""
        return _iterated(self._calls.watch(job, poll_s=poll_s))

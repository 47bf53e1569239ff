"""The finetune client in asyncio: submit jobs to a running server and follow them (docs/jobs.md).

    from sglang_harli import AsyncFinetuneClient

    async with AsyncFinetuneClient("tcp://127.0.0.1:30100") as client:
        job = await client.submit("pairs.jsonl", suffix="support", n_epochs=3)
        job = await client.wait(job.id)
        print(job.status, job.fine_tuned_model)

Each call has a socket of its own, so that one client may serve several tasks.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, ClassVar

import msgspec
import zmq

from sglang_harli.client import subscription, uploading
from sglang_harli.client.data_source import Data, DataSource
from sglang_harli.client.exchange import (
    CONNECT_TIMEOUT_S,
    RECONNECT_TIMEOUT_S,
    REPLY_TIMEOUT_S,
    Exchange,
    Service,
)
from sglang_harli.client.sockets import AsyncWire, Wire, closed
from sglang_harli.config import CURVE_KEYS_ENV, DEFAULT_ENDPOINT, ENDPOINT_ENV, parse_live
from sglang_harli.errors import ConfigError, DataError, NotFoundError
from sglang_harli.names import short_id
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.curve_keys import load_client_keys
from sglang_harli.protocol.public import Event, Job, SetAnswer, StatusAnswer

SUBMIT_TIMEOUT_S = 3600.0  # validation of a large file takes its time
PAGE = 1000  # events asked for at once
UPLOADS = 5  # times that a file is uploaded, where the service forgets it before it made the job


class AsyncFinetuneClient:
    """``FinetuneClient`` for asyncio: the same arguments, methods and errors, awaited; ``events``
    and ``watch`` are async iterators."""

    _wire_kind: ClassVar[type[Wire]] = AsyncWire

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
        notice = on_connection or (lambda _text: None)
        self._service = Service(
            self.endpoint, folder, connect_timeout_s, reply_timeout_s, reconnect_timeout_s, notice
        )
        self._context: zmq.Context[Any] = zmq.Context()
        self._wires: set[Wire] = set()  # of the calls under way, iterators that are kept included
        self._closed = False
        # Also for a client that is forgotten.  It holds context and sockets: left to the garbage
        # collector with the client, the context may be asked to end first, and would wait for its
        # sockets for ever.
        self._end = weakref.finalize(self, _end, self._context, self._wires)
        self._end.atexit = False

    def close(self) -> None:
        """Release the sockets for good: calls under way end with StateError."""
        self._closed = True
        self._end()

    async def __aenter__(self) -> AsyncFinetuneClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # ---- jobs
    async def submit(
        self,
        data: Data | None = None,
        *,
        suffix: str | None = None,
        filename: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        resume_from: str | None = None,
        validation: Data | None = None,
        **hyperparameters: Any,
    ) -> Job:
        """Create a job from training data; the job is durable when this returns.

        Args:
            data: path of a file or a folder (docs/data.md), a file's bytes, or an iterable of rows
                (``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``, for example).
            suffix: goes into the adapter's name.
            filename: how the job calls the data; default: the path's name.
            idempotency_key: a repeated submit with the same key returns the same job (default: a
                new key; retries within one call share it).
            priority: -100 to 100; higher ones leave the queue first.
            resume_from: id of a job that is over and whose checkpoint this one begins with.
                Without ``data`` its training goes on; with ``data`` its adapter learns from other
                data.
            validation: rows to evaluate while training, as ``data``.
            hyperparameters: see ``protocol.public.Hyperparameters``.

        Raises:
            DataError: the file cannot be read, or lines are at fault; no job was created.
            ConfigError: a hyperparameter or the suffix is not accepted.
        """
        pairs = _hyperparameters(hyperparameters)
        if data is None and resume_from is None:
            raise ConfigError(
                "nothing to train on: give data (--data), or resume_from (--resume-from) with a job that is over",
                param="data",
            )
        args = public.SubmitArgs(
            filename=(filename or "")[:1024],
            suffix=suffix,
            hyperparameters=pairs,
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            priority=priority,
            resume_from=resume_from,
        )
        accepted.check(args)  # before a large file is read
        if data is None and validation is not None:
            raise ConfigError(
                "a job that goes on keeps its validation data: give data too, which begins a new course",
                param="validation",
            )
        if data is None:
            return await self._request("submit", args, Job, SUBMIT_TIMEOUT_S)
        return await self._with_data("submit", args, data, Job, validation)

    async def check(
        self, data: Data, *, filename: str | None = None, **hyperparameters: Any
    ) -> dict[str, Any]:
        """What would become of training data, by the server's own tokenizer and chat template; no
        job is made.

        Args:
            data, filename: see ``submit``.
            hyperparameters: ``max_seq_length`` and ``on_overflow`` count.

        Returns:
            ``ok``, ``rows``, ``notes``, ``bad_lines`` and more (docs/data.md, The report).
        """
        args = public.CheckArgs(
            filename=(filename or "")[:1024], hyperparameters=_hyperparameters(hyperparameters)
        )
        accepted.check(args)
        return await self._with_data("check", args, data, dict[str, Any])

    async def list(
        self, *, status: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[Job]:
        """Jobs of this server; ``after`` is the id of the last one seen."""
        args = public.ListArgs(limit=limit, after=after, status=status)
        return (await self._request("list", args, _Jobs)).jobs

    async def get(self, job: str) -> Job:
        """The job with this id."""
        return await self._request("get", public.JobArgs(job=job), Job)

    async def find(self, name: str) -> Job:
        """The job named by its id, short id, the beginning of its id, suffix or adapter name.

        Raises:
            ConfigError: several jobs fit.
            NotFoundError: none does.
        """
        try:
            return await self.get(name)
        except NotFoundError as error:
            missing = error
        jobs = await self.list(limit=10_000)
        for matches in (
            [job for job in jobs if name in (short_id(job.id), job.fine_tuned_model)],
            [job for job in jobs if name == job.suffix],
            [job for job in jobs if len(name) >= 4 and job.id.removeprefix("ftjob-").startswith(name)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                ids = ", ".join(job.id for job in matches)
                raise ConfigError(f"{name!r} names {len(matches)} jobs: give one of {ids}", param="job")
        raise missing

    async def pause(self, job: str) -> Job:
        """Pause a queued or running job; its state is saved."""
        return await self._request("pause", public.JobArgs(job=job), Job)

    async def resume(self, job: str) -> Job:
        """Queue a paused job again."""
        return await self._request("resume", public.JobArgs(job=job), Job)

    async def cancel(self, job: str) -> Job:
        """End a job for good."""
        return await self._request("cancel", public.JobArgs(job=job), Job)

    async def prioritize(self, job: str, priority: int) -> Job:
        """Change the priority (-100 to 100) of a job that is not over; a running one goes on."""
        return await self._request("prioritize", public.PrioritizeArgs(job=job, priority=priority), Job)

    # ---- the server
    async def status(self) -> StatusAnswer:
        """The service, serving and training as the scheduler sees them, and the queue."""
        return await self._request("status", {}, StatusAnswer)

    async def set(self, *, if_revision: int | None = None, **values: float | str | None) -> SetAnswer:
        """Change latency targets and caps, in milliseconds, or ``max_train_mem``, a size: for
        example ``tpot_slo_ms=40, max_train_mem="2GiB"``; None clears one.

        Raises:
            ConfigError: unknown name or a value out of bounds.
        """
        live = dict(parse_live(name, "none" if v is None else str(v)) for name, v in values.items())
        return await self._request("set", public.SetArgs(values=live, if_revision=if_revision), SetAnswer)

    # ---- following a job
    async def events(self, job: str, after: int = 0, *, follow: bool = False) -> AsyncGenerator[Event]:
        """Events with an id above ``after``, each once; with ``follow`` also those to come, until
        the job is over, across reconnections."""
        with self._exchange() as exchange:
            last: Event | None = None
            patience = exchange.patience() if follow else None
            if follow and after:  # the cursor may stand on the last event of all
                args = public.EventsArgs(job=job, after=after - 1, limit=1)
                found = await exchange.request("events", args, subscription.Events, patience=patience)
                last = next(iter(found.events), None)
            while True:
                args = public.EventsArgs(job=job, after=after, limit=PAGE)
                page = await exchange.request("events", args, subscription.Events, patience=patience)
                for event in page.events:
                    yield event
                    last, after = event, event.id
                if len(page.events) < PAGE:
                    break
            if patience is None or (last is not None and last.type in subscription.FINAL_EVENTS):
                return
            async with contextlib.aclosing(subscription.follow(exchange, job, after, patience)) as news:
                async for event in news:
                    yield event

    async def watch(self, job: str, *, poll_s: float = 0.5) -> AsyncGenerator[Job]:
        """The job again and again, ``poll_s`` seconds apart, until it is over."""
        with self._exchange() as exchange:
            patience = exchange.patience()
            while True:
                found = await exchange.request("get", public.JobArgs(job=job), Job, patience=patience)
                yield found
                if found.status.final:
                    return
                await exchange.wire.sleep(poll_s)

    async def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        """The job once it has succeeded, failed or been cancelled.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
        """
        end = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        with self._exchange() as exchange:
            patience = exchange.patience()
            while True:
                found = await exchange.request("get", public.JobArgs(job=job), Job, patience=patience)
                if found.status.final:
                    return found
                if time.monotonic() + poll_s > end:
                    raise TimeoutError(
                        f"job {job} is {found.status} after {timeout_s:g} s, step {found.step}"
                    )
                await exchange.wire.sleep(poll_s)

    # ---- exchanges
    @contextlib.contextmanager
    def _exchange(self) -> Iterator[Exchange]:
        """On a wire that ``close`` knows of."""
        wire = self._wire_kind(self._context, self.endpoint, self._keys)
        self._wires.add(wire)
        try:
            if self._closed:
                raise closed()
            yield Exchange(wire, self._service)
        finally:
            wire.end()
            self._wires.discard(wire)

    async def _request(self, verb: str, args: Any, kind: Any, timeout_s: float | None = None) -> Any:
        with self._exchange() as exchange:
            return await exchange.request(verb, args, kind, timeout_s)

    async def _with_data(
        self,
        verb: str,
        args: public.SubmitArgs | public.CheckArgs,
        data: Data,
        kind: Any,
        validation: Data | None = None,
    ) -> Any:
        """Data of one frame go with the request: whatever ends it, nothing stays at the service.
        Larger ones, and validation data, are uploaded before, and the request names the upload."""
        with self._exchange() as exchange, contextlib.ExitStack() as opened:
            source = await _opened(exchange, opened, data)
            evaluated = None
            if validation is not None and isinstance(args, public.SubmitArgs):
                evaluated = await _opened(exchange, opened, validation)
                await _announce(exchange, args, evaluated)
            args.filename = args.filename or source.name[:1024]
            args.size = source.size
            args.sha256 = await exchange.wire.run(source.sha256)
            patience = exchange.patience(ask_again=False)
            inline = source.size <= public.MAX_FRAME_BYTES
            frames = [source.read(0, source.size)] if inline else []
            if inline and evaluated is None:
                return await exchange.request(verb, args, kind, SUBMIT_TIMEOUT_S, patience, frames)
            for left in reversed(range(UPLOADS)):
                if not inline:
                    args.upload = await uploading.upload(exchange, source, args.sha256, patience)
                if evaluated is not None and isinstance(args, public.SubmitArgs):
                    sha256 = args.validation_sha256
                    args.validation_upload = await uploading.upload(exchange, evaluated, sha256, patience)
                try:
                    return await exchange.request(verb, args, kind, SUBMIT_TIMEOUT_S, patience, frames)
                except NotFoundError as error:  # the service was restarted in between
                    if error.code != "upload_unknown" or not left:
                        raise
            raise AssertionError


async def _opened(exchange: Exchange, stack: contextlib.ExitStack, data: Data) -> DataSource:
    """Data to be sent, until ``stack`` ends.  A folder's rows are read in the wire's thread; the
    caller's iterable stays in the caller's."""
    is_path = isinstance(data, str | os.PathLike)
    return stack.enter_context(
        await exchange.wire.run(lambda: DataSource(data)) if is_path else DataSource(data)
    )


async def _announce(exchange: Exchange, args: public.SubmitArgs, validation: DataSource) -> None:
    """Say in ``args`` which validation file will come."""
    if not validation.size:
        raise DataError(f"{validation.name}: it holds no line of data", param="validation")
    args.validation_filename, args.validation_size = validation.name[:1024], validation.size
    args.validation_sha256 = await exchange.wire.run(validation.sha256)


def _hyperparameters(pairs: dict[str, Any]) -> dict[str, Any]:
    """Those given, parsed: the same check as the server's."""
    parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))
    return {name: parsed[name] for name in pairs}


def _end(context: zmq.Context[Any], wires: set[Wire]) -> None:
    for wire in list(wires):
        wire.end()
    context.destroy(0)  # with a socket that a signal handler of this thread found half-opened


class _Jobs(msgspec.Struct):
    jobs: list[Job]

"""The finetune client for asyncio: every verb of the wire (docs/jobs.md), once.  ``blocking`` runs it on a loop of its own.

Each call has a socket of its own, so that one client may serve several tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import msgspec
import zmq

from sglang_harli.client import exchange, uploading
from sglang_harli.client.connection import Connection, closed
from sglang_harli.client.data_source import Data, DataSource
from sglang_harli.client.exchange import (
    CONNECT_TIMEOUT_S,
    RECONNECT_TIMEOUT_S,
    REPLY_TIMEOUT_S,
    SLICE_S,
    Exchange,
    Patience,
)
from sglang_harli.config import CURVE_KEYS_ENV, DEFAULT_ENDPOINT, ENDPOINT_ENV, parse_live
from sglang_harli.errors import ConfigError, NotFoundError
from sglang_harli.names import short_id
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.curve_keys import load_client_keys
from sglang_harli.protocol.public import CheckArgs, Event, Job, SetAnswer, StatusAnswer, SubmitArgs

SUBMIT_TIMEOUT_S = 3600.0  # validation of a large file takes its time
RENEW_S = 10.0  # a subscription ends when it is not renewed for 30 s
PAGE = 1000  # events asked for at once
UPLOADS = 5  # times that a large file is sent, where the service forgets it before it has made the job
FINAL_EVENTS = ("succeeded", "failed", "cancelled")

Kind = TypeVar("Kind")


class AsyncFinetuneClient:
    """``FinetuneClient`` for asyncio: the same methods and errors, awaited; ``events`` and ``watch`` are async iterators.

    Args: see ``FinetuneClient``.  ``on_connection`` is called in the event loop.
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
        self.endpoint = endpoint or os.environ.get(ENDPOINT_ENV) or DEFAULT_ENDPOINT
        folder = os.fspath(curve_keys) if curve_keys else os.environ.get(CURVE_KEYS_ENV)
        self._keys = load_client_keys(folder) if folder else None
        self._exchange = Exchange(
            self.endpoint,
            connect_timeout_s,
            reply_timeout_s,
            reconnect_timeout_s,
            notice=on_connection,
            keys=folder,
        )
        self._context: zmq.Context[Any] = zmq.Context()
        self._wires: set[Connection] = set()  # of the calls under way, iterators that are kept included
        self._closed = False
        # Also for a client that is forgotten.  It holds context and sockets: left to the garbage collector with the
        # client, the context may be asked to end first, and would wait for its sockets for ever.
        self._end = weakref.finalize(self, _end, self._context, self._wires)
        self._end.atexit = False

    async def __aenter__(self) -> AsyncFinetuneClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; the client cannot be used afterwards, and calls under way end with StateError."""
        self._closed = True
        self._end()

    # ------------------------------------------------------------------ jobs
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
        args = submit_args(data, suffix, filename, idempotency_key, priority, resume_from, hyperparameters)
        with source_of(data) as source:
            return await self.send_submit(args, source)

    async def check(
        self, data: Data, *, filename: str | None = None, **hyperparameters: Any
    ) -> dict[str, Any]:
        args = check_args(filename, hyperparameters)
        with DataSource(data) as source:
            return await self.send_check(args, source)

    async def send_submit(self, args: SubmitArgs, source: DataSource | None) -> Job:
        """``submit``, with its arguments checked and its data open."""
        with self._wire() as wire:
            if source is None:
                return await self._ask(wire, "submit", args, Job, timeout_s=SUBMIT_TIMEOUT_S)
            return await self._with_data(wire, "submit", args, source, Job)

    async def send_check(self, args: CheckArgs, source: DataSource) -> dict[str, Any]:
        """``check``, likewise."""
        with self._wire() as wire:
            return await self._with_data(wire, "check", args, source, dict[str, Any])

    async def list(
        self, *, status: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[Job]:
        args = public.ListArgs(limit=limit, after=after, status=status)
        with self._wire() as wire:
            return (await self._ask(wire, "list", args, _Jobs)).jobs

    async def get(self, job: str) -> Job:
        return await self._job("get", job)

    async def find(self, name: str) -> Job:
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
        return await self._job("pause", job)

    async def resume(self, job: str) -> Job:
        return await self._job("resume", job)

    async def cancel(self, job: str) -> Job:
        return await self._job("cancel", job)

    async def prioritize(self, job: str, priority: int) -> Job:
        with self._wire() as wire:
            return await self._ask(wire, "prioritize", public.PrioritizeArgs(job=job, priority=priority), Job)

    async def status(self) -> StatusAnswer:
        with self._wire() as wire:
            return await self._ask(wire, "status", {}, StatusAnswer)

    async def set(self, *, if_revision: int | None = None, **values: float | str | None) -> SetAnswer:
        live = dict(
            parse_live(name, "none" if value is None else str(value)) for name, value in values.items()
        )
        with self._wire() as wire:
            return await self._ask(
                wire, "set", public.SetArgs(values=live, if_revision=if_revision), SetAnswer
            )

    # ------------------------------------------------------------------ following
    async def wait(self, job: str, timeout_s: float | None = None, *, poll_s: float = 0.5) -> Job:
        end = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        patience = self._exchange.patience()
        with self._wire() as wire:
            while True:
                found = await self._ask(wire, "get", public.JobArgs(job=job), Job, patience=patience)
                if found.status.final:
                    return found
                if time.monotonic() + poll_s > end:
                    raise TimeoutError(
                        f"job {job} is {found.status} after {timeout_s:g} s, step {found.step}"
                    )
                await wire.sleep(poll_s)

    async def watch(self, job: str, *, poll_s: float = 0.5) -> AsyncIterator[Job]:
        patience = self._exchange.patience()
        with self._wire() as wire:
            while True:
                found = await self._ask(wire, "get", public.JobArgs(job=job), Job, patience=patience)
                yield found
                if found.status.final:
                    return
                await wire.sleep(poll_s)

    async def events(self, job: str, after: int = 0, *, follow: bool = False) -> AsyncIterator[Event]:
        """Each event once; with ``follow`` until the job is over, across reconnections."""
        last: Event | None = None
        patience = self._exchange.patience() if follow else None
        with self._wire() as wire:
            if follow and after:  # the cursor may stand on the last event of all
                args = public.EventsArgs(job=job, after=after - 1, limit=1)
                found = await self._ask(wire, "events", args, _Events, patience=patience)
                last = next(iter(found.events), None)
            while True:
                args = public.EventsArgs(job=job, after=after, limit=PAGE)
                page = await self._ask(wire, "events", args, _Events, patience=patience)
                for event in page.events:
                    yield event
                    last, after = event, event.id
                if len(page.events) < PAGE:
                    break
            if patience is not None and (last is None or last.type not in FINAL_EVENTS):
                async with contextlib.aclosing(self._subscription(wire, job, after, patience)) as news:
                    async for event in news:
                        yield event

    async def _subscription(
        self, wire: Connection, job: str, after: int, patience: Patience
    ) -> AsyncGenerator[Event]:
        head = exchange.header("events", public.EventsArgs(job=job, after=after, follow=True))
        await self._exchange.connect(wire, patience)
        renewed = received = time.monotonic()
        wire.send([public.encode(head)])
        while True:
            what, payload = await wire.wait(SLICE_S)
            now = time.monotonic()
            if what == "lost" or now - received > self._exchange.reply_timeout_s:
                patience.lost()
                await self._exchange.connect(wire, patience)
                renewed, received = 0.0, time.monotonic()
            elif what == "message" and (reply := exchange.reply(payload, head.id)) is not None:
                received = now
                patience.back()
                for event in _news(reply):
                    if event.id > after:
                        after = event.id
                        yield event
                        if event.type in FINAL_EVENTS:
                            wire.send([public.encode(exchange.header("unsubscribe", {"id": head.id}))])
                            return
            if time.monotonic() - renewed > RENEW_S:  # the same id: renews, and brings what was missed
                head.args["after"], renewed = after, time.monotonic()
                wire.send([public.encode(head)])

    # ------------------------------------------------------------------ helpers
    @contextlib.contextmanager
    def _wire(self) -> Iterator[Connection]:
        """A connection that ``close`` knows of."""
        if self._closed:
            raise closed()
        wire = Connection(self._context, self.endpoint, self._keys)
        self._wires.add(wire)
        try:
            yield wire
        finally:
            wire.end()
            self._wires.discard(wire)

    async def _ask(
        self,
        wire: Connection,
        verb: str,
        args: Any,
        kind: type[Kind],
        data: Any = (),
        timeout_s: float | None = None,
        patience: Patience | None = None,
    ) -> Kind:
        return await self._exchange.request(wire, verb, args, kind, data, timeout_s, patience)

    async def _job(self, verb: str, job: str) -> Job:
        with self._wire() as wire:
            return await self._ask(wire, verb, public.JobArgs(job=job), Job)

    async def _with_data(
        self, wire: Connection, verb: str, args: SubmitArgs | CheckArgs, source: DataSource, kind: type[Kind]
    ) -> Kind:
        """A file of one frame goes with the request, a larger one is uploaded before."""
        args.filename = args.filename or source.name[:1024]
        args.size = source.size
        args.sha256 = await asyncio.to_thread(source.sha256)
        patience = self._exchange.patience(ask_again=False)
        if source.size <= public.MAX_FRAME_BYTES:
            frames = [source.read(0, source.size)]
            return await self._ask(wire, verb, args, kind, frames, SUBMIT_TIMEOUT_S, patience)
        for left in reversed(range(UPLOADS)):
            args.upload = await uploading.upload(self._exchange, wire, source, args.sha256, patience)
            try:
                return await self._ask(wire, verb, args, kind, (), SUBMIT_TIMEOUT_S, patience)
            except NotFoundError as error:  # the service was restarted in between
                if error.code != "upload_unknown" or not left:
                    raise
        raise AssertionError


def submit_args(
    data: Data | None,
    suffix: str | None,
    filename: str | None,
    key: str | None,
    priority: int,
    resume_from: str | None,
    pairs: dict[str, Any],
) -> SubmitArgs:
    """The arguments of a submit, checked before its data are read.

    Raises:
        ConfigError: one is not accepted; the service says the same.
    """
    parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))
    if data is None and resume_from is None:
        raise ConfigError(
            "nothing to train on: give data (--data), or resume_from (--resume-from) with a job that is over",
            param="data",
        )
    args = SubmitArgs(
        filename=(filename or "")[:1024],
        suffix=suffix,
        hyperparameters={name: parsed[name] for name in pairs},
        idempotency_key=key or uuid.uuid4().hex,
        priority=priority,
        resume_from=resume_from,
    )
    accepted.check(args)
    return args


def check_args(filename: str | None, pairs: dict[str, Any]) -> CheckArgs:
    """The arguments of a check, likewise."""
    parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))
    args = CheckArgs(filename=(filename or "")[:1024], hyperparameters={name: parsed[name] for name in pairs})
    accepted.check(args)
    return args


def source_of(data: Data | None) -> contextlib.AbstractContextManager[DataSource | None]:
    """The data, opened; None where there are none."""
    return contextlib.nullcontext() if data is None else DataSource(data)


def _news(reply: public.Reply) -> list[Event]:
    """The events in a reply to a subscription; none where the service asks to try again."""
    if reply.event is not None:
        return [reply.event]
    if reply.error is not None and reply.error.code in (public.BUSY, "not_ready"):
        return []  # the next renewal asks again
    return exchange.result(reply, _Events).events


class _Jobs(msgspec.Struct):
    jobs: list[Job]


class _Events(msgspec.Struct):
    events: list[Event]


def _end(context: zmq.Context[Any], wires: set[Connection]) -> None:
    for wire in list(wires):
        wire.end()
    context.term()

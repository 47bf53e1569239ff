"""What a client says to the finetune service and what it expects back, without input or output.

Each call is a generator of (operation, argument) pairs, carried out by ``client``, blocking or not:
``open`` a fresh socket; ``send`` frames; ``wait`` at most so many seconds, answered by ``connected``,
``lost``, ``message`` with its first frame, or ``nothing``; ``sleep`` seconds; ``emit`` an event to the
caller.  The generator returns the call's result.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import orjson

from sglang_harli import errors
from sglang_harli.core import SUFFIX_PATTERN, short_id
from sglang_harli.errors import (
    ConfigError,
    DataError,
    HarliError,
    NotFoundError,
    NotReadyError,
    ProtocolError,
)
from sglang_harli.protocol import public
from sglang_harli.protocol.public import Event, Job, Reply, Request, SetAnswer, StatusAnswer

CONNECT_TIMEOUT_S = 30.0  # how long a call tries to reach the service, also after it was lost
REPLY_TIMEOUT_S = 60.0
SUBMIT_TIMEOUT_S = 3600.0  # validation of a large file takes its time
RENEW_S = 10.0  # a subscription ends when it is not renewed for 30 s
SLICE_S = 1.0
PAGE = 1000  # events asked for at once
FINAL_EVENTS = ("succeeded", "failed", "cancelled")

T = TypeVar("T")
Data = str | os.PathLike[str] | bytes | Iterable[Mapping[str, Any]]
# (operation, argument): open/None, send/frames, wait/seconds -> (what, payload), sleep/seconds, emit/event
Steps = Generator[tuple[str, Any], Any, T]

_ERRORS: dict[str, type[HarliError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HarliError) and kind is not HarliError
}
_ERRORS |= {  # refusals with a code of their own
    "memory_budget": ConfigError,
    "idempotency_conflict": ConfigError,
    "unsupported_version": ProtocolError,
    "data_mismatch": ProtocolError,
}


class Calls:
    """One generator per verb."""

    def __init__(self, endpoint: str, connect_timeout_s: float, reply_timeout_s: float) -> None:
        self.endpoint = endpoint
        self.connect_timeout_s = connect_timeout_s
        self.reply_timeout_s = reply_timeout_s

    # ---- one exchange
    def connect(self) -> Steps[None]:
        yield "open", None
        end = time.monotonic() + self.connect_timeout_s
        while (left := end - time.monotonic()) > 0:
            what, _ = yield "wait", min(left, SLICE_S)
            if what == "connected":
                return
        raise NotReadyError(
            f"no finetune service answers at {self.endpoint} (tried for {self.connect_timeout_s:g} s): start the "
            f"server, or give its --harli-finetune-endpoint by --endpoint or HARLI_ENDPOINT",
            code="cannot_connect",
        )

    def request(
        self, verb: str, args: Any, kind: Any, data: Sequence[Any] = (), timeout_s: float | None = None
    ) -> Steps[Any]:
        """Send, and send again where the connection was lost; the answer as ``kind``."""
        timeout_s = timeout_s or self.reply_timeout_s
        head = _header(verb, args)
        frames = [public.encode(head), *data]
        yield from self.connect()
        yield "send", frames
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            what, payload = yield "wait", min(left, SLICE_S)
            if what == "message":
                reply = _reply(payload, head.id)
                if reply is not None:
                    return _result(reply, kind)
            elif what == "lost":
                yield from self.connect()
                yield "send", frames
                end = time.monotonic() + timeout_s
        raise NotReadyError(
            f"{self.endpoint} did not answer {verb!r} within {timeout_s:g} s: try again later"
        )

    # ---- verbs
    def submit(
        self, data: Data, *, suffix: str | None, filename: str | None, key: str | None, pairs: dict[str, Any]
    ) -> Steps[Job]:
        if suffix is not None and not re.match(SUFFIX_PATTERN, suffix):
            raise ConfigError(
                f"suffix {suffix!r} is not accepted: give 1 to 40 of A-Z a-z 0-9 . _ - beginning with a letter "
                "or digit",
                param="suffix",
            )
        parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))  # the same check as the server's
        name, content = _content(data)
        args = public.SubmitArgs(
            filename=(filename or name)[:1024],
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            suffix=suffix,
            hyperparameters={name: parsed[name] for name in pairs},
            idempotency_key=key or uuid.uuid4().hex,
        )
        view, size = memoryview(content), public.MAX_FRAME_BYTES
        frames = [view[at : at + size] for at in range(0, len(view), size)]
        return (yield from self.request("submit", args, Job, frames, SUBMIT_TIMEOUT_S))

    def jobs(self, status: str | None, limit: int, after: str | None) -> Steps[list[Job]]:
        args = public.ListArgs(limit=limit, after=after, status=status)
        return (yield from self.request("list", args, _Jobs)).jobs

    def find(self, name: str) -> Steps[Job]:
        try:
            return (yield from self.job("get", name))
        except NotFoundError as error:
            missing = error
        jobs = yield from self.jobs(None, 10_000, None)
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

    def job(self, verb: str, job: str) -> Steps[Job]:
        return (yield from self.request(verb, public.JobArgs(job=job), Job))

    def status(self) -> Steps[StatusAnswer]:
        return (yield from self.request("status", {}, StatusAnswer))

    def set(self, values: dict[str, float | None], if_revision: int | None) -> Steps[SetAnswer]:
        args = public.SetArgs(values=values, if_revision=if_revision)
        return (yield from self.request("set", args, SetAnswer))

    def wait(self, job: str, timeout_s: float | None, poll_s: float) -> Steps[Job]:
        end = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            found = yield from self.job("get", job)
            if found.status.final:
                return found
            if time.monotonic() + poll_s > end:
                raise TimeoutError(f"job {job} is {found.status} after {timeout_s:g} s, step {found.step}")
            yield "sleep", poll_s

    def events(self, job: str, after: int, follow: bool) -> Steps[None]:
        """Emits each event once; with ``follow`` until the job is over, across reconnections."""
        last: Event | None = None
        if follow and after:  # the cursor may stand on the last event of all
            args = public.EventsArgs(job=job, after=after - 1, limit=1)
            last = next(iter((yield from self.request("events", args, _Events)).events), None)
        while True:
            page = yield from self.request(
                "events", public.EventsArgs(job=job, after=after, limit=PAGE), _Events
            )
            for event in page.events:
                yield "emit", event
                last, after = event, event.id
            if len(page.events) < PAGE:
                break
        if follow and (last is None or last.type not in FINAL_EVENTS):
            yield from self._subscription(job, after)

    def _subscription(self, job: str, after: int) -> Steps[None]:
        head = _header("events", public.EventsArgs(job=job, after=after, follow=True))
        yield from self.connect()
        renewed = heard = time.monotonic()
        yield "send", [public.encode(head)]
        while True:
            what, payload = yield "wait", SLICE_S
            if what == "lost":
                yield from self.connect()
                renewed, heard = 0.0, time.monotonic()
            elif what == "message" and (reply := _reply(payload, head.id)) is not None:
                heard = time.monotonic()
                news = [reply.event] if reply.event is not None else _result(reply, _Events).events
                for event in news:
                    if event.id > after:
                        after = event.id
                        yield "emit", event
                        if event.type in FINAL_EVENTS:
                            yield "send", [public.encode(_header("unsubscribe", {"id": head.id}))]
                            return
            now = time.monotonic()
            if now - heard > self.reply_timeout_s:
                raise NotReadyError(
                    f"{self.endpoint} has not answered for {self.reply_timeout_s:g} s: try again later"
                )
            if now - renewed > RENEW_S:  # the same id: renews, and brings what was missed
                head.args["after"], renewed = after, now
                yield "send", [public.encode(head)]


class _Jobs(msgspec.Struct):
    jobs: list[Job]


class _Events(msgspec.Struct):
    events: list[Event]


def _header(verb: str, args: Any) -> Request:
    return Request(v=public.VERSION, id=uuid.uuid4().hex, verb=verb, args=msgspec.to_builtins(args))


def _reply(payload: bytes, request_id: str) -> Reply | None:
    reply: Reply = public.decode(payload, Reply)
    return reply if reply.id == request_id or (not reply.ok and not reply.id) else None


def _result(reply: Reply, kind: Any) -> Any:
    if not reply.ok:
        raise _error(reply)
    try:
        return msgspec.convert(reply.result, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the server's answer is not understood (another version?): {error}") from error


def _error(reply: Reply) -> HarliError:
    body = reply.error
    if body is None:
        return HarliError("the server refused the request and gave no reason")
    kind = _ERRORS.get(body.code, HarliError)
    return kind(body.message, code=body.code, param=body.param, details=body.details)


def _content(data: Data) -> tuple[str, bytes]:
    """(file name, JSONL bytes)."""
    if isinstance(data, bytes | bytearray | memoryview):
        name, content = "data.jsonl", bytes(data)
    elif isinstance(data, str | os.PathLike):
        path = Path(data)
        try:
            name, content = path.name, path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}", code="unreadable_file", param="data"
            ) from error
    else:
        name, content = "rows.jsonl", b"".join(orjson.dumps(row) + b"\n" for row in data)
    if len(content) > public.MAX_DATA_BYTES:
        raise DataError(
            f"{name} has {len(content)} bytes; at most {public.MAX_DATA_BYTES} are accepted", param="data"
        )
    return name, content

"""What a client says to the finetune service and what it expects back, without input or output.

Each call is a generator of (operation, argument) pairs, carried out by ``client``, blocking or not
(see ``exchange``); ``emit`` hands an event or a job to the caller.  The generator returns the
call's result.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from sglang_harli.client import exchange, uploading
from sglang_harli.client.data_source import Data, DataSource
from sglang_harli.client.exchange import SLICE_S, Exchange, Patience, Steps
from sglang_harli.errors import ConfigError, NotFoundError
from sglang_harli.names import short_id
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.public import Event, Job, SetAnswer, StatusAnswer

SUBMIT_TIMEOUT_S = 3600.0  # validation of a large file takes its time
RENEW_S = 10.0  # a subscription ends when it is not renewed for 30 s
PAGE = 1000  # events asked for at once
UPLOADS = 5  # times that a large file is sent, where the service forgets it before it has made the job
FINAL_EVENTS = ("succeeded", "failed", "cancelled")


class Calls(Exchange):
    """One generator per verb."""

    # ---- verbs
    def submit(
        self,
        data: Data | None,
        *,
        suffix: str | None,
        filename: str | None,
        key: str | None,
        pairs: dict[str, Any],
        priority: int = 0,
        resume_from: str | None = None,
    ) -> Steps[Job]:
        parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))  # the same check as the server's
        if data is None and resume_from is None:
            raise ConfigError(
                "nothing to train on: give data (--data), or resume_from (--resume-from) with a job that is over",
                param="data",
            )
        args = public.SubmitArgs(
            filename=(filename or "")[:1024],
            suffix=suffix,
            hyperparameters={name: parsed[name] for name in pairs},
            idempotency_key=key or uuid.uuid4().hex,
            priority=priority,
            resume_from=resume_from,
        )
        accepted.check(args)  # before a large file is read
        if data is None:
            return (yield from self.request("submit", args, Job, (), SUBMIT_TIMEOUT_S))
        with DataSource(data) as source:
            return (yield from self._with_data("submit", args, source, Job))

    def check(self, data: Data, *, filename: str | None, pairs: dict[str, Any]) -> Steps[dict[str, Any]]:
        parsed = msgspec.to_builtins(public.parse_hyperparameters(pairs))
        args = public.CheckArgs(
            filename=(filename or "")[:1024], hyperparameters={name: parsed[name] for name in pairs}
        )
        accepted.check(args)
        with DataSource(data) as source:
            return (yield from self._with_data("check", args, source, dict[str, Any]))

    def _with_data(
        self, verb: str, args: public.SubmitArgs | public.CheckArgs, source: DataSource, kind: Any
    ) -> Steps[Any]:
        """A file of one frame goes with the request, a larger one is uploaded before."""
        args.filename = args.filename or source.name[:1024]
        args.size = source.size
        args.sha256 = yield "call", source.sha256
        patience = self.patience(ask_again=False)
        if source.size <= public.MAX_FRAME_BYTES:
            frames = [source.read(0, source.size)]
            return (yield from self.request(verb, args, kind, frames, SUBMIT_TIMEOUT_S, patience))
        for left in reversed(range(UPLOADS)):
            args.upload = yield from uploading.upload(self, source, args.sha256, patience)
            try:
                return (yield from self.request(verb, args, kind, (), SUBMIT_TIMEOUT_S, patience))
            except NotFoundError as error:  # the service was restarted in between
                if error.code != "upload_unknown" or not left:
                    raise
        raise AssertionError

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

    def job(self, verb: str, job: str, patience: Patience | None = None) -> Steps[Job]:
        return (yield from self.request(verb, public.JobArgs(job=job), Job, patience=patience))

    def prioritize(self, job: str, priority: int) -> Steps[Job]:
        args = public.PrioritizeArgs(job=job, priority=priority)
        return (yield from self.request("prioritize", args, Job))

    def status(self) -> Steps[StatusAnswer]:
        return (yield from self.request("status", {}, StatusAnswer))

    def set(self, values: dict[str, float | str | None], if_revision: int | None) -> Steps[SetAnswer]:
        args = public.SetArgs(values=values, if_revision=if_revision)
        return (yield from self.request("set", args, SetAnswer))

    def wait(self, job: str, timeout_s: float | None, poll_s: float) -> Steps[Job]:
        end = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        patience = self.patience()
        while True:
            found = yield from self.job("get", job, patience)
            if found.status.final:
                return found
            if time.monotonic() + poll_s > end:
                raise TimeoutError(f"job {job} is {found.status} after {timeout_s:g} s, step {found.step}")
            yield "sleep", poll_s

    def watch(self, job: str, poll_s: float) -> Steps[None]:
        """Emits the job at each look, the last time when it is over."""
        patience = self.patience()
        while True:
            found = yield from self.job("get", job, patience)
            yield "emit", found
            if found.status.final:
                return
            yield "sleep", poll_s

    def events(self, job: str, after: int, follow: bool) -> Steps[None]:
        """Emits each event once; with ``follow`` until the job is over, across reconnections."""
        last: Event | None = None
        patience = self.patience() if follow else None
        if follow and after:  # the cursor may stand on the last event of all
            args = public.EventsArgs(job=job, after=after - 1, limit=1)
            found = yield from self.request("events", args, _Events, patience=patience)
            last = next(iter(found.events), None)
        while True:
            args = public.EventsArgs(job=job, after=after, limit=PAGE)
            page = yield from self.request("events", args, _Events, patience=patience)
            for event in page.events:
                yield "emit", event
                last, after = event, event.id
            if len(page.events) < PAGE:
                break
        if patience is not None and (last is None or last.type not in FINAL_EVENTS):
            yield from self._subscription(job, after, patience)

    def _subscription(self, job: str, after: int, patience: Patience) -> Steps[None]:
        head = exchange.header("events", public.EventsArgs(job=job, after=after, follow=True))
        yield from self.connect(patience)
        renewed = heard = time.monotonic()
        yield "send", [public.encode(head)]
        while True:
            what, payload = yield "wait", SLICE_S
            now = time.monotonic()
            if what == "lost" or now - heard > self.reply_timeout_s:
                patience.lost()
                yield from self.connect(patience)
                renewed, heard = 0.0, time.monotonic()
            elif what == "message" and (reply := exchange.reply(payload, head.id)) is not None:
                heard = now
                patience.back()
                for event in _news(reply):
                    if event.id > after:
                        after = event.id
                        yield "emit", event
                        if event.type in FINAL_EVENTS:
                            yield "send", [public.encode(exchange.header("unsubscribe", {"id": head.id}))]
                            return
            if time.monotonic() - renewed > RENEW_S:  # the same id: renews, and brings what was missed
                head.args["after"], renewed = after, time.monotonic()
                yield "send", [public.encode(head)]


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

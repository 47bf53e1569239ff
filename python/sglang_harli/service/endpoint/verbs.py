"""The verbs of the public wire (docs/jobs.md); the router turns their HarliErrors into replies."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, ProtocolError
from sglang_harli.protocol import public
from sglang_harli.protocol.public import Job
from sglang_harli.service.endpoint.live_options import LiveOptions
from sglang_harli.service.endpoint.subscriptions import LEASE_S, Subscriptions
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.disk_usage import DiskUsage
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.transitions import JobRecord, Transition
from sglang_harli.service.links.http_link import HttpLink
from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.publish.publication import PublicationQueue
from sglang_harli.service.submit.submission import Submission

# A pause saves the run's state first: an answer after this time shows the job still running.
TAKE_S = 2.0
STATUS_S = 1.0
UNREADABLE_SHOWN = 20  # jobs that `status` names


@dataclass(frozen=True, slots=True)
class Caller:
    """``route``: frames that lead back to the client; ``request``: its id for this request."""

    route: tuple[bytes, ...]
    request: str


class Verbs:
    """The verbs of the public wire, by name; ``about``: fixed facts for ``status``."""

    def __init__(
        self,
        *,
        registry: JobRegistry,
        submission: Submission,
        publication: PublicationQueue,
        options: LiveOptions,
        scheduler: SchedulerLink,
        http: HttpLink,
        subscriptions: Subscriptions,
        readers: Executor,
        about: dict[str, Any],
    ) -> None:
        self._registry = registry
        self._submission = submission
        self._publication = publication
        self._options = options
        self._scheduler = scheduler
        self._http = http
        self._subscriptions = subscriptions
        self._readers = readers
        self._about = about
        self._started = time.monotonic()
        self._space = DiskUsage(registry.run_dir)
        self._verbs: dict[str, Callable[[Caller, dict[str, Any]], Awaitable[Any]]] = {
            "list": self._list,
            "get": self._get,
            "events": self._events,
            "unsubscribe": self._unsubscribe,
            "pause": self._pause,
            "resume": self._resume,
            "cancel": self._cancel,
            "prioritize": self._prioritize,
            "status": self._status,
            "set": self._set,
        }

    async def do(self, caller: Caller, request: public.Request, frames: Sequence[bytes]) -> Any:
        """The result of one request; raises HarliError: the refusal."""
        if request.v != public.VERSION:
            raise ProtocolError(
                f"protocol version {request.v} is not spoken here, this service speaks {public.VERSION}",
                code="unsupported_version",
                param="v",
            )
        if request.verb == "submit":
            args = public.convert_args(request.args, public.SubmitArgs)
            return await self._submission.submit(args, frames)
        if request.verb == "check":
            return await self._submission.check(public.convert_args(request.args, public.CheckArgs), frames)
        if request.verb == "upload":
            return await self._submission.upload(public.convert_args(request.args, public.UploadArgs), frames)
        verb = self._verbs.get(request.verb)
        if verb is None:
            known = ", ".join(public.VERBS)
            raise ProtocolError(f"unknown verb {request.verb[:64]!r}; accepted: {known}", param="verb")
        if frames:
            raise ProtocolError(f"{request.verb} takes no data, {len(frames)} frames came behind the header")
        return await verb(caller, request.args)

    # ---- reading
    async def _list(self, _caller: Caller, raw: dict[str, Any]) -> Any:
        """Newest first; ``after`` names the last job of the page before."""
        args = public.convert_args(raw, public.ListArgs)
        if args.status not in (None, *JobStatus):
            known = ", ".join(JobStatus)
            raise ConfigError(f"status {args.status!r} is not accepted: give one of {known}", param="status")
        before = math.inf if args.after is None else self._registry.get(args.after).number
        wanted = args.metadata.items() if args.metadata is not None else None
        found = (
            record
            for record in self._registry.newest()
            if record.number < before
            and args.status in (None, record.status)
            and (not record.metadata if wanted is None else wanted <= record.metadata.items())
        )
        page = list(islice(found, args.limit + 1))
        shown = [self._registry.public(r) for r in page[: args.limit]]
        return {"jobs": shown, "has_more": len(page) > args.limit}

    async def _get(self, _caller: Caller, raw: dict[str, Any]) -> Job:
        return self._registry.public(self._registry.get(public.convert_args(raw, public.JobArgs).job))

    async def _events(self, caller: Caller, raw: dict[str, Any]) -> Any:
        args = public.convert_args(raw, public.EventsArgs)
        self._registry.get(args.job)
        loop = asyncio.get_running_loop()
        events = await loop.run_in_executor(
            self._readers, self._registry.store.events, args.job, args.after, args.limit
        )
        last = events[-1].id if events else args.after
        if args.follow:
            self._subscriptions.follow(caller.route, caller.request, args.job, last)
        return {"events": events, "last": last, "lease_s": LEASE_S if args.follow else None}

    async def _unsubscribe(self, caller: Caller, raw: dict[str, Any]) -> Any:
        """``id``: of the request that subscribed; without it all of this connection's end."""
        request = raw.get("id")
        if request is not None and not isinstance(request, str):
            raise ProtocolError("id must be the id of an events request", param="id")
        return {"ended": self._subscriptions.unfollow(caller.route, request)}

    # ---- jobs
    async def _pause(self, _caller: Caller, raw: dict[str, Any]) -> Job:
        return await self._change(raw, transitions.ask_pause, lambda r: r.status != JobStatus.RUNNING)

    async def _resume(self, _caller: Caller, raw: dict[str, Any]) -> Job:
        return await self._change(raw, transitions.ask_resume, lambda r: True)

    async def _cancel(self, _caller: Caller, raw: dict[str, Any]) -> Job:
        def ask(record: JobRecord) -> Transition:
            return transitions.ask_cancel(
                record,
                time.time(),  # stamp: when the job ended
                in_flight=self._publication.in_flight == record.id,
            )

        return await self._change(raw, ask, lambda r: r.status != JobStatus.RUNNING)

    async def _prioritize(self, _caller: Caller, raw: dict[str, Any]) -> Job:
        args = public.convert_args(raw, public.PrioritizeArgs)
        return await self._ask(args.job, lambda r: transitions.ask_priority(r, args.priority), lambda r: True)

    async def _change(
        self, raw: dict[str, Any], ask: Callable[[JobRecord], Transition], taken: Callable[[JobRecord], bool]
    ) -> Job:
        return await self._ask(public.convert_args(raw, public.JobArgs).job, ask, taken)

    async def _ask(
        self, job: str, ask: Callable[[JobRecord], Transition], taken: Callable[[JobRecord], bool]
    ) -> Job:
        """What is wanted is durable before the answer; what is may follow (see TAKE_S)."""
        record = self._registry.get(job)
        change = ask(record)
        # Nothing to change: it was asked before, and that may still be on its way to the disk.
        asked = self._registry.apply(change) if change.record != record else None
        await self._registry.durable(asked)
        return self._registry.public(await self._registry.wait_until(job, taken, TAKE_S))

    # ---- the server
    async def _status(self, _caller: Caller, _raw: dict[str, Any]) -> public.StatusAnswer:
        report = await self._scheduler.ask_status(STATUS_S)
        hello = self._scheduler.hello
        service = self._about | {
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "scheduler_pid": hello.pid if hello else None,
            "scheduler_answers": report is not None,
            "http_pid": self._http.pid,
            "refusal": self._scheduler.refusal,
            "hold": (hello.hold or None) if hello else None,
            "base": hello.base.shown if hello and hello.base else None,
            "store": self._registry.journal.trouble or self._subscriptions.trouble or "ok",
            "unreadable_jobs": self._unreadable(),
            "trouble": self._scheduler.peer.trouble or self._http.peer.trouble,
            "followers": len(self._subscriptions),
            "space": await self._space.report(),
        }
        if self._http.prefill_servers is not None:  # of a decode server
            service["prefill_servers"] = {
                server["url"]: {name: value for name, value in server.items() if name != "url"}
                for server in self._http.prefill_servers
            }
        return public.StatusAnswer(
            service=service,
            serving=report.serving if report else None,
            training=report.training if report else None,
            jobs=self._registry.counts(),
            options=self._options.effective,
            revision=self._options.revision,
            pool=report.pool if report else None,
        )

    def _unreadable(self) -> dict[str, str]:
        """Jobs whose records cannot be read or written, and why: the first of them."""
        found = {job: unreadable.why for job, unreadable in self._registry.unreadable.items()}
        found |= self._registry.journal.unwritable
        shown = dict(islice(found.items(), UNREADABLE_SHOWN))
        return shown if len(found) <= UNREADABLE_SHOWN else shown | {"in all": str(len(found))}

    async def _set(self, _caller: Caller, raw: dict[str, Any]) -> public.SetAnswer:
        return await self._options.set(public.convert_args(raw, public.SetArgs))

"""``/v1/fine_tuning/jobs``: jobs, as the openai client makes, follows and ends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from sglang_harli.managers.http.openai import schemas
from sglang_harli.managers.http.openai.body import convert, idempotency_key, json_object, query
from sglang_harli.managers.http.openai.endpoint import Api, answer, object_id, referred
from sglang_harli.managers.http.openai.errors import Refusal
from sglang_harli.managers.http.openai.fine_tuning.create import CreateJobBody, submit_args
from sglang_harli.managers.http.openai.fine_tuning.shapes import (
    CheckpointList,
    EventList,
    JobList,
    JobShape,
    checkpoint_shape,
    checkpoint_step,
    event_number,
    event_shape,
    job_shape,
)
from sglang_harli.managers.http.openai.uploads import EmptyBody
from sglang_harli.protocol import accepted
from sglang_harli.protocol.calls.fine_tuning import (
    CheckpointsArgs,
    CheckpointsPage,
    EventsBeforeArgs,
    EventsPage,
)
from sglang_harli.protocol.public import Job, JobArgs, ListArgs

TAG = "Fine-tuning"
SUBMIT_S = 120.0
MAX_JOBS = 200  # of one answer, whatever limit is asked for
_Limit = Annotated[int, Meta(ge=1, le=1000)]
# Paths that OpenAI has and this server does not, and what to use.
UNSERVED = {
    "/v1/fine_tuning/checkpoints/{name:path}/permissions": (
        "permissions of checkpoints are not served here: one key is one tenant, who may use every model"
    ),
    "/v1/fine_tuning/checkpoints/{name:path}/permissions/{permission_id}": (
        "permissions of checkpoints are not served here: one key is one tenant, who may use every model"
    ),
    "/v1/fine_tuning/alpha/graders/run": "graders are not served here: there is no reinforcement fine-tuning",
    "/v1/fine_tuning/alpha/graders/validate": (
        "graders are not served here: there is no reinforcement fine-tuning"
    ),
}

T = TypeVar("T", JobList, EventList, CheckpointList)


class JobsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """A page of jobs; ``metadata[NAME]=VALUE``: those that have these pairs; ``metadata=null``:
    those that have none."""

    after: str | None = None
    limit: _Limit = 20
    metadata: Annotated[
        dict[str, str] | Literal["null"], accepted.words("metadata[NAME]=VALUE, or null")
    ] = {}


class EventsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """A page of a job's events."""

    after: str | None = None
    limit: _Limit = 20


class CheckpointsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """A page of a job's checkpoints."""

    after: str | None = None
    limit: _Limit = 10


class JobPage(Struct, kw_only=True):
    """The answer of the service's ``list``."""

    jobs: list[Job]
    has_more: bool


def add(router: APIRouter, api: Api) -> None:
    """Add the routes to a guarded router."""
    _add_reading(router, api)
    _add_checkpoints(router, api)
    _add_changing(router, api)
    for path, why in UNSERVED.items():
        router.add_api_route(path, _unserved(why), methods=["GET", "POST", "DELETE"], include_in_schema=False)


def _add_reading(router: APIRouter, api: Api) -> None:
    async def list_jobs(request: Request) -> Response:
        """A page of the jobs, newest first."""
        asked = query(request, JobsQuery, maps=("metadata",)) or JobsQuery()
        wanted = asked.metadata if isinstance(asked.metadata, dict) else None
        args = ListArgs(limit=min(asked.limit, MAX_JOBS), after=asked.after, metadata=wanted)
        with referred("after"):
            page = await api.calls.call("list", args, JobPage)
        return answer(_page(JobList, [job_shape(job) for job in page.jobs], page.has_more))

    async def retrieve_job(request: Request) -> Response:
        """One job's object."""
        return answer(job_shape(await api.calls.call("get", _job(request), Job)))

    async def list_events(request: Request) -> Response:
        """A page of a job's events, newest first."""
        job = object_id(request, "job_id", "job")
        asked = query(request, EventsQuery) or EventsQuery()
        before = event_number(job, asked.after) if asked.after is not None else None
        args = EventsBeforeArgs(job=job, before=before, limit=asked.limit)
        page = await api.calls.call("events_before", args, EventsPage)
        return answer(_page(EventList, [event_shape(event) for event in page.events], page.has_more))

    one, ids = "/v1/fine_tuning/jobs/{job_id}", ("job_id",)
    described = schemas.route(
        "listPaginatedFineTuningJobs", TAG, "GET", JobList, query=JobsQuery, refers=True
    )
    router.add_api_route("/v1/fine_tuning/jobs", list_jobs, **described)
    described = schemas.route("retrieveFineTuningJob", TAG, "GET", JobShape, ids=ids)
    router.add_api_route(one, retrieve_job, **described)
    described = schemas.route("listFineTuningEvents", TAG, "GET", EventList, ids=ids, query=EventsQuery)
    router.add_api_route(f"{one}/events", list_events, **described)


def _add_checkpoints(router: APIRouter, api: Api) -> None:
    async def list_checkpoints(request: Request) -> Response:
        """A page of a job's checkpoints, newest first; each answers under its name."""
        job = object_id(request, "job_id", "job")
        asked = query(request, CheckpointsQuery) or CheckpointsQuery()
        before = checkpoint_step(job, asked.after) if asked.after is not None else None
        args = CheckpointsArgs(job=job, before=before, limit=asked.limit)
        page = await api.calls.call("checkpoints", args, CheckpointsPage)
        shapes = [checkpoint_shape(job, found) for found in page.checkpoints]
        return answer(_page(CheckpointList, shapes, page.has_more))

    described = schemas.route(
        "listFineTuningJobCheckpoints",
        TAG,
        "GET",
        CheckpointList,
        ids=("job_id",),
        query=CheckpointsQuery,
    )
    router.add_api_route("/v1/fine_tuning/jobs/{job_id}/checkpoints", list_checkpoints, **described)


def _add_changing(router: APIRouter, api: Api) -> None:
    async def create_job(request: Request) -> Response:
        """Begin a job: its file is looked at afterwards."""
        query(request, None)
        key = idempotency_key(request)
        body = convert(await json_object(request), CreateJobBody)
        args = submit_args(body, key)
        with referred("harli.resume_from"):
            job = await api.calls.call("submit", args, Job, timeout_s=SUBMIT_S)
        return answer(job_shape(job))

    def change(verb: str, text: str) -> Callable[[Request], Any]:
        async def change_job(request: Request) -> Response:
            args = _job(request)
            idempotency_key(request)  # a repeated one answers the same in any case
            convert(await json_object(request), EmptyBody)
            return answer(job_shape(await api.calls.call(verb, args, Job)))

        change_job.__doc__ = text
        change_job.__name__ = f"{verb}_job"
        return change_job

    described = schemas.route("createFineTuningJob", TAG, "POST", JobShape, body=CreateJobBody, refers=True)
    router.add_api_route("/v1/fine_tuning/jobs", create_job, **described)
    for verb, text in (
        ("cancel", "End a job; its checkpoints stay."),
        ("pause", "Pause a job: its state is saved."),
        ("resume", "Let a paused job go on."),
    ):
        described = schemas.route(
            f"{verb}FineTuningJob", TAG, "POST", JobShape, ids=("job_id",), body=EmptyBody
        )
        router.add_api_route(f"/v1/fine_tuning/jobs/{{job_id}}/{verb}", change(verb, text), **described)


def _unserved(why: str) -> Callable[[Request], Any]:
    async def refuse(_request: Request) -> Response:
        raise Refusal(why, status=404, code="unsupported")

    return refuse


def _job(request: Request) -> JobArgs:
    query(request, None)
    return JobArgs(job=object_id(request, "job_id", "job"))


def _page(kind: type[T], data: list[Any], has_more: bool) -> T:
    return kind(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )

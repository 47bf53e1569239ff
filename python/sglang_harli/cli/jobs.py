"""Commands about jobs: submit, follow, steer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sglang_harli.cli.session import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    AsJson,
    Endpoint,
    JobName,
    LatestJob,
    Session,
    pair,
    print_json,
    say,
    session,
)
from sglang_harli.errors import NotFoundError

if TYPE_CHECKING:
    from sglang_harli.protocol.public import Job

app = typer.Typer()


class _SubmitCommand(TyperCommand):
    """Adds the hyperparameters, read from the protocol only when the help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from sglang_harli.cli import hyperparameter_help

        with formatter.section("Hyperparameters (KEY=VALUE)"):
            formatter.write_dl(list(hyperparameter_help.describe()))


@app.command(cls=_SubmitCommand)
def submit(
    ctx: typer.Context,
    hyperparameters: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="See below.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows of messages, prompt and completion, Alpaca or ShareGPT (docs/data.md), as for check-data.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows that are evaluated while the job trains, as in --data."),
    ] = None,
    resume_from: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Go on from a job that is over: with its own data, or with --data on a new course with its adapter.",
        ),
    ] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; higher ones leave the queue first.")] = 0,
    suffix: Annotated[str | None, typer.Option(help="Goes into the adapter's name.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A repeated submit with the same key makes no second job.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Submit a finetune job."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        pairs = dict(pair(text) for text in hyperparameters or [])
        origin = client.find(resume_from).id if resume_from else None
        job = client.submit(
            data,
            suffix=suffix,
            idempotency_key=idempotency_key,
            priority=priority,
            resume_from=origin,
            validation=validation,
            **pairs,
        )
        _show_job(current, job)


def _show_job(current: Session, job: Job) -> None:
    def lines() -> Iterator[str]:
        from sglang_harli.cli import view

        return view.job_lines(job)

    current.show(job, lines)


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 100,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List jobs."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        jobs = client.list(status=status, limit=limit)
        if current.json:
            print_json(jobs)
        elif not jobs:
            say("no jobs")
        else:
            from sglang_harli.cli import view

            view.show_jobs(jobs)


@app.command()
def show(ctx: typer.Context, job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show a job."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        _show_job(current, client.find(job))


@app.command()
def watch(
    ctx: typer.Context, job: LatestJob = None, endpoint: Endpoint = None, as_json: AsJson = False
) -> None:
    """Follow a job until it is over; the exit code tells how it ended (0, 1 failed, 7
    cancelled)."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        found = next(iter([client.find(job)] if job else client.list(limit=1)), None)
        if found is None:
            raise NotFoundError("there is no job yet: harli submit --data FILE makes one")
        if current.json:
            last = client.wait(found.id)
            print_json(last)
        else:
            from sglang_harli.cli import view

            last = view.watch(client.watch(found.id))
        if last.status == "failed":
            raise typer.Exit(EXIT_FAILED)
        if last.status == "cancelled":
            raise typer.Exit(EXIT_CANCELLED)


@app.command()
def events(
    ctx: typer.Context,
    job: JobName,
    after: Annotated[int, typer.Option(help="Only events with an id above this one.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events; with --json one object a line."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        from sglang_harli.cli import view

        for event in client.events(client.find(job).id, after, follow=follow):
            if current.json:
                print_json(event)
            else:
                say(view.event_line(event))


def _steering(verb: str, text: str) -> None:
    """One command that asks for another state of a job and prints the job."""

    def command(ctx: typer.Context, job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
        with session(ctx, endpoint, as_json) as current, current.client() as client:
            _show_job(current, getattr(client, verb)(client.find(job).id))

    app.command(verb, help=text)(command)


_steering("pause", "Pause a queued or running job; its state is saved.")
_steering("resume", "Queue a paused job again.")
_steering("cancel", "End a job for good.")


@app.command(context_settings={"ignore_unknown_options": True})  # a negative number is no option
def prioritize(
    ctx: typer.Context,
    job: JobName,
    priority: Annotated[int, typer.Argument(metavar="N", help="-100 to 100.")],
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Change a job's priority: higher ones leave the queue first; a running job is not
    preempted."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        _show_job(current, client.prioritize(client.find(job).id, priority))

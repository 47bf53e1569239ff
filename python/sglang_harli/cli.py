"""``harli``: submit finetune jobs to a running server, follow and steer them.

Parses and prints; what is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sglang_harli import errors
from sglang_harli.config import DEFAULT_ENDPOINT, ENDPOINT_ENV, LIVE
from sglang_harli.errors import DataError, HarliError, NotFoundError

if TYPE_CHECKING:
    from sglang_harli.client import FinetuneClient
    from sglang_harli.protocol.public import Job

EXIT_FAILED = 1
EXIT_CANCELLED = 7
# First match counts; anything else is 1.
EXIT_CODES: tuple[tuple[type[HarliError], int], ...] = (
    (DataError, 3),
    (NotFoundError, 4),
    (errors.StateError, 5),
    (errors.NotReadyError, 6),
    (errors.ConfigError, 2),
    (errors.UnsupportedError, 2),
)
EPILOG = (
    "Exit codes: 0 done; 1 the job failed, or the server did; 2 wrong usage or value; 3 bad training data; "
    "4 no such job; 5 the job's state does not allow it; 6 the server cannot be reached; 7 the watched job was "
    "cancelled."
)

app = typer.Typer(
    name="harli",
    help="Finetune while you serve: submit LoRA jobs to a running sglang-harli server and follow them.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to load than all the rest
    pretty_exceptions_enable=False,
)

Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help=f"The server's --harli-finetune-endpoint [env: {ENDPOINT_ENV}; default: {DEFAULT_ENDPOINT}]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, short id, suffix or adapter name.")]
LatestJob = Annotated[str | None, typer.Argument(metavar="JOB", help="As elsewhere; default: the newest.")]


@dataclass
class Session:
    """What every command knows: where the server is and how to print."""

    endpoint: str | None
    json: bool

    def client(self) -> FinetuneClient:
        from sglang_harli.client import FinetuneClient

        return FinetuneClient(self.endpoint)

    def show(self, value: Any, lines: Callable[[], Iterator[str]]) -> None:
        if self.json:
            print_json(value)
        else:
            for line in lines():
                print(line)


def print_json(value: Any) -> None:
    import msgspec
    import orjson

    option = orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0
    print(orjson.dumps(msgspec.to_builtins(value), option=option).decode(), flush=True)


@contextmanager
def session(ctx: typer.Context, endpoint: str | None, as_json: bool) -> Iterator[Session]:
    """Merges the options before and after the command; prints errors and turns them into exit codes."""
    outer: Session = ctx.obj
    merged = Session(endpoint or outer.endpoint, as_json or outer.json)
    try:
        yield merged
    except HarliError as error:
        report(error, merged.json)
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)
        raise typer.Exit(code) from error


def report(error: HarliError, as_json: bool) -> None:
    """One line on stderr per problem; with --json also the whole as an object on stdout."""
    # The message of a data error repeats its first lines at fault, which follow one by one.
    headline = error.message.partition(": line ")[0] if error.details else error.message
    print(f"error: {headline}", file=sys.stderr)
    for row in error.details:
        place = f"line {row['line']}: " if "line" in row else ""
        print(f"  {place}{row.get('reason') or row.get('message') or row}", file=sys.stderr)
    if as_json:
        print_json(
            {"error": {name: getattr(error, name) for name in ("code", "message", "param", "details")}}
        )


def _show_version(wanted: bool) -> None:
    if wanted:
        import sglang_harli

        print(sglang_harli.__version__)
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    ctx.obj = Session(endpoint, as_json)


# ------------------------------------------------------------------ on this machine
@app.command("make-model")
def make_model(
    ctx: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    arch: Annotated[str, typer.Option(help="llama, mistral, qwen2 or qwen3")] = "llama",
    size: Annotated[str, typer.Option(help="tiny, 25m, 100m, 1b or 8b")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the text, the weights and the order of the rows.")] = 0,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="About how long to pretrain on two cores; 0: random weights [default: by size, 12 for tiny]"
        ),
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="No weights: for SGLang's --load-format dummy.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a small model with tokenizer and chat template, for trying things out."""
    with session(ctx, None, as_json) as current:
        from sglang_harli.tools import make_model as tool

        made = tool.make_model(
            directory,
            arch,
            size=size,
            dtype=dtype,
            seed=seed,
            seconds=seconds,
            weights=not config_only,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        current.show(
            made, lambda: iter([f"{made['path']}: {arch}, {made['vocab_size']} tokens, loss {made['loss']}"])
        )


@app.command("check-data")
def check_data(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="FILE", help="A JSONL file.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the model that is (or will be) served.")],
    max_seq_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens [default: the model's limit]")
    ] = None,
    on_overflow: Annotated[str, typer.Option(help="error, truncate or drop longer rows")] = "error",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As for serving.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate training data locally, and show what would be learned."""
    with session(ctx, None, as_json) as current:
        from sglang_harli.tools import check_data as tool

        found = tool.check_data(
            data,
            model,
            max_seq_length=max_seq_length,
            on_overflow=on_overflow,
            trust_remote_code=trust_remote_code,
        )
        if current.json:
            print_json(found)
        else:
            from sglang_harli.tools import job_view

            job_view.data_report(found)
        if not found["ok"]:
            report(DataError(found["message"], details=found["bad_lines"]), as_json=False)
            raise typer.Exit(3)


# ------------------------------------------------------------------ jobs
class _SubmitCommand(TyperCommand):
    """Adds the hyperparameters, which are read from the protocol only when the help is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from sglang_harli.tools import hyperparameter_help

        with formatter.section("Hyperparameters (KEY=VALUE)"):
            formatter.write_dl(list(hyperparameter_help.describe()))


@app.command(cls=_SubmitCommand)
def submit(
    ctx: typer.Context,
    hyperparameters: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="See below.")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="JSONL with messages, or prompt and completion.")
    ] = ...,  # pyright: ignore[reportArgumentType]
    suffix: Annotated[str | None, typer.Option(help="Goes into the adapter's name.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A repeated submit with the same key makes no second job.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Submit a finetune job."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        pairs = dict(_pair(text) for text in hyperparameters or [])
        job = client.submit(data, suffix=suffix, idempotency_key=idempotency_key, **pairs)
        _show_job(current, job)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise errors.ConfigError(
            f"{text!r} is not accepted: give key=value, for example n_epochs=3", param=text
        )
    return name.strip().replace("-", "_"), value.strip()


def _show_job(current: Session, job: Job) -> None:
    def lines() -> Iterator[str]:
        from sglang_harli.tools import job_view

        return job_view.job_lines(job)

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
            print("no jobs")
        else:
            from sglang_harli.tools import job_view

            job_view.console().print(job_view.job_table(jobs))


@app.command()
def show(ctx: typer.Context, job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show a job."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        _show_job(current, client.find(job))


@app.command()
def watch(
    ctx: typer.Context, job: LatestJob = None, endpoint: Endpoint = None, as_json: AsJson = False
) -> None:
    """Follow a job until it is over; the exit code tells how it ended (0, 1 failed, 7 cancelled)."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        found = next(iter([client.find(job)] if job else client.list(limit=1)), None)
        if found is None:
            raise NotFoundError("there is no job yet: harli submit --data FILE makes one")
        if current.json:
            last = client.wait(found.id)
            print_json(last)
        else:
            from sglang_harli.tools import job_view

            last = job_view.watch(lambda: client.get(found.id))
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
        from sglang_harli.tools import job_view

        for event in client.events(client.find(job).id, after, follow=follow):
            if current.json:
                print_json(event)
            else:
                print(job_view.event_line(event), flush=True)


def _steering(verb: str, text: str) -> None:
    """One command that asks for another state of a job and prints the job."""

    def command(ctx: typer.Context, job: JobName, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
        with session(ctx, endpoint, as_json) as current, current.client() as client:
            _show_job(current, getattr(client, verb)(client.find(job).id))

    app.command(verb, help=text)(command)


_steering("pause", "Pause a queued or running job; its state is saved.")
_steering("resume", "Queue a paused job again.")
_steering("cancel", "End a job for good.")


# ------------------------------------------------------------------ the server
@app.command()
def status(ctx: typer.Context, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the service, serving, training and the queue."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        from sglang_harli.tools import job_view

        answer = client.status()
        current.show(answer, lambda: job_view.status_lines(answer))


@app.command(
    "set",
    help="Change latency targets and caps (milliseconds) while the server runs: "
    + ", ".join(n.replace("_", "-") for n in LIVE)
    + ".",
)
def set_options(
    ctx: typer.Context,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...", help="For example tpot-slo-ms=40; none clears an optional one."
        ),
    ],
    if_revision: Annotated[int | None, typer.Option(help="Only if this is the revision in force.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    with session(ctx, endpoint, as_json) as current:
        from sglang_harli.config import parse_live

        wanted = dict(parse_live(*_pair(text)) for text in values)
        with current.client() as client:
            answer = client.set(if_revision=if_revision, **wanted)

        def lines() -> Iterator[str]:
            yield f"{answer.outcome} (revision {answer.revision}){': ' + answer.message if answer.message else ''}"
            yield from (f"  {name} = {value}" for name, value in answer.effective.items())

        current.show(answer, lines)
        if answer.outcome not in ("applied", "deferred"):
            raise typer.Exit(5)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()

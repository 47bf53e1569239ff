"""Commands about the server: its state, and the options that change while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from sglang_harli.cli.session import AsJson, Endpoint, pair, session
from sglang_harli.config import LIVE

app = typer.Typer()


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

        wanted = dict(parse_live(*pair(text)) for text in values)
        with current.client() as client:
            answer = client.set(if_revision=if_revision, **wanted)

        def lines() -> Iterator[str]:
            yield f"{answer.outcome} (revision {answer.revision}){': ' + answer.message if answer.message else ''}"
            yield from (f"  {name} = {value}" for name, value in answer.effective.items())

        current.show(answer, lines)
        if answer.outcome not in ("applied", "deferred"):
            raise typer.Exit(5)

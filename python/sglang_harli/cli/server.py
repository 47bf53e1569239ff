"""Commands about the server: its state, and the options that change while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from sglang_harli.cli.session import AsJson, Endpoint, notice, pair, session
from sglang_harli.config import LIVE, HarliOptions
from sglang_harli.errors import ConfigError

app = typer.Typer()


@app.command()
def status(ctx: typer.Context, endpoint: Endpoint = None, as_json: AsJson = False) -> None:
    """Show the service, serving, training, memory and the queue."""
    with session(ctx, endpoint, as_json) as current, current.client() as client:
        from sglang_harli.cli import view

        answer = client.status()
        current.show(answer, lambda: view.status_lines(answer))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    ctx: typer.Context,
    url: Annotated[
        str, typer.Option(help="The HTTP address of a running server.")
    ] = "http://127.0.0.1:30000",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HARLI_API_KEY", help="The running server's API key, if it has one."),
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start a server for this model instead, with the launcher's flags that follow, and end it afterwards.",
        ),
    ] = None,
    run_dir: Annotated[
        str, typer.Option(help="With --model-path: the run directory of the server that will use the table.")
    ] = HarliOptions.run_dir,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The table [default: where the server looks for it at its next start]"
        ),
    ] = None,
    budget_s: Annotated[
        float, typer.Option(help="Begin no further load after so many seconds; another run goes on.")
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Measure how long a server's batches take, for the latency predictor of its next start."""
    with session(ctx, None, as_json) as current:
        if not 0 <= budget_s <= 86_400:
            raise ConfigError(
                f"budget_s={budget_s!r} is not accepted: give 0 to 86,400 seconds", param="budget_s"
            )
        from sglang_harli.cli import view
        from sglang_harli.tools import profile as tool

        if model_path is not None:
            made = tool.sweep_new(
                model_path,
                ctx.args,
                output=output or HarliOptions(run_dir=run_dir).profile_path,
                budget_s=budget_s,
                progress=view.loads_bar,
                report=notice,
            )
        elif ctx.args:
            raise ConfigError(
                f"{ctx.args[0]!r} is not an option of harli profile: the launcher's flags need --model-path",
                param=ctx.args[0],
            )
        else:
            port = tool.ServerPort(url, api_key)
            made = tool.sweep(port, output=output, budget_s=budget_s, progress=view.loads_bar)
        current.show(made, lambda: view.profile_lines(made))


@app.command(
    "set",
    help="Change latency targets and caps (milliseconds) and training's share of memory (a size) while the server "
    "runs: " + ", ".join(n.replace("_", "-") for n in LIVE) + ".",
)
def set_options(
    ctx: typer.Context,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...",
            help="For example tpot-slo-ms=40 or max-train-mem=2GiB; none clears an optional one.",
        ),
    ],
    if_revision: Annotated[int | None, typer.Option(help="Only if this is the revision in force.")] = None,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    with session(ctx, endpoint, as_json) as current:
        from sglang_harli.config import parse_live

        wanted = dict(parse_live(*pair(text, "tpot-slo-ms=50")) for text in values)
        with current.client() as client:
            answer = client.set(if_revision=if_revision, **wanted)

        def lines() -> Iterator[str]:
            yield f"{answer.outcome} (revision {answer.revision}){': ' + answer.message if answer.message else ''}"
            yield from (f"  {name} = {value}" for name, value in answer.effective.items())

        current.show(answer, lines)
        if answer.outcome not in ("applied", "deferred"):
            raise typer.Exit(5)

"""``harli simulate``: the policies on traces of requests, without a server."""

from __future__ import annotations

from typing import Annotated

import typer

from sglang_harli.cli.session import EXIT_FAILED, AsJson, print_json, say, session
from sglang_harli.errors import ConfigError

app = typer.Typer()


@app.command("simulate")
def simulate(
    ctx: typer.Context,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Judge our policy against the others; by default on the traces that come with harli.",
        ),
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A trace: Azure's or BurstGPT's CSV, or benchmark/traces.py's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many rows of it.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="spatial (SM splits of an RTX 6000 Ada) or temporal (decode and training by turns)"
        ),
    ] = "spatial",
    rate: Annotated[
        str, typer.Option(help="Training by SMs: proportional, saturating (at 56) or both.")
    ] = "both",
    tpot_ms: Annotated[float, typer.Option(help="Target time per output token, milliseconds.")] = 40.0,
    max_itl_ms: Annotated[
        float | None, typer.Option(help="Cap on any gap, milliseconds [default: none]")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Spread of true around predicted times, for example 0.03.")
    ] = 0.0,
    error: Annotated[float, typer.Option(help="True times are this share above predicted ones.")] = 0.0,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Prompts are prefilled on the same device.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the scheduler's policy on a trace of requests, beside those known from the field."""
    with session(ctx, None, as_json) as current:
        if not compare and trace is None:
            raise ConfigError("give --compare, or a trace with --trace FILE", param="trace")
        from sglang_harli.simulation import command

        given = {"trace": trace, "limit": limit, "mode": mode, "rate": rate, "prefill": prefill, "seed": seed}
        times = {"tpot_ms": tpot_ms, "max_itl_ms": max_itl_ms, "noise": noise, "error": error}
        result = command.simulate(command.SimulationOptions(**given, **times))
        if current.json:
            print_json(result.as_dict())
        else:
            for line in result.lines(brief=compare):
                say(line)
        if compare and result.problems:
            raise typer.Exit(EXIT_FAILED)

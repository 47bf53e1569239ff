"""``harli doctor``: what is wrong with an installation or a running server, and how to mend it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sglang_harli.cli.session import EXIT_FAILED, AsJson, Endpoint, say, session
from sglang_harli.config import HarliOptions

if TYPE_CHECKING:
    from sglang_harli.tools.doctor.examine import Result

app = typer.Typer()


@app.command()
def doctor(
    ctx: typer.Context,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The server's --harli-run-dir [default: that of the server at the endpoint, else "
            f"{HarliOptions.run_dir}]",
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The server's HTTP address [default: http://127.0.0.1:PORT]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="The server's --port [default: that of --http, else 30000]")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HARLI_API_KEY", help="The running server's API key, if it has one."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK", help="Run this check alone; may be repeated [default: all]"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out device, seams and hooks, which import torch and SGLang for half a minute.",
        ),
    ] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this installation or a running server, and how to mend it; the exit
    code is 1 where there is a problem."""
    with session(ctx, endpoint, as_json) as current:
        from sglang_harli.tools.doctor import examine
        from sglang_harli.tools.doctor.asked import Asked

        names = examine.chosen(only or (), quick=quick)
        # The options of `harli` itself and those behind `doctor`, merged.
        server = {"endpoint": current.endpoint, "curve_keys": current.curve_keys, "api_key": api_key}
        asked = Asked(run_dir=run_dir, http=http, port=port, **server)
        results = _shown(examine.examine(asked, names), as_json=current.json)
        if current.json:
            from sglang_harli.tools import terminal

            terminal.say_json(examine.report(asked, results))
        if not examine.healthy(results):
            raise typer.Exit(EXIT_FAILED)


def _shown(found: Iterable[Result], *, as_json: bool) -> list[Result]:
    """All results; without JSON each is printed as it comes, and a summary."""
    results = []
    for result in found:
        results.append(result)
        if not as_json:
            for line in _lines(result):
                say(line)
    if not as_json:
        say(_summary(results))
    return results


def _lines(result: Result) -> Iterator[str]:
    finding = result.finding
    yield f"{f'[{finding.status}]':<10} {result.name + ':':<18} {finding.found}"
    if finding.mend:
        yield f"{'':<10} mend: {finding.mend}"


def _summary(results: list[Result]) -> str:
    counts = Counter(result.finding.status.value for result in results)
    many = {"warning": "warnings", "problem": "problems"}
    shown = (f"{count} {many.get(name, name) if count > 1 else name}" for name, count in counts.items())
    return f"{len(results)} checks: " + ", ".join(shown)

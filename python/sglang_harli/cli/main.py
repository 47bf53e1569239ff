"""``harli``: submit finetune jobs to a server, follow and steer them; heavy imports are lazy."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sglang_harli.cli import doctor, jobs, local, server, simulate
from sglang_harli.cli.session import AsJson, CurveKeys, Endpoint, Session, notice, say

EPILOG = (
    "Exit codes: 0 done; 1 the job failed, or the server did, or doctor found a problem; 2 wrong usage or value; 3 bad training data; "
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


def _show_version(wanted: bool) -> None:
    if wanted:
        import sglang_harli

        say(sglang_harli.__version__)
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    endpoint: Endpoint = None,
    curve_keys: CurveKeys = None,
    as_json: AsJson = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    ctx.obj = Session(endpoint, as_json, curve_keys)


for part in (local, jobs, server, doctor, simulate):
    app.registered_commands += part.app.registered_commands


def main() -> None:
    """The console script."""
    from sglang_harli.tools import terminal

    terminal.prepare()
    code: Any = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except terminal.OutputError as error:
        code = error.exit_code
        if code != terminal.BROKEN_PIPE:  # a reader that has gone, as in `harli list | head -1`, knows
            notice(f"error: the output cannot be written: {error}")
    sys.exit(code)

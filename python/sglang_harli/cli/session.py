"""What the commands of ``harli`` share: the server's address, printing, exit codes of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_harli import errors
from sglang_harli.config import CURVE_KEYS_ENV, DEFAULT_ENDPOINT, ENDPOINT_ENV
from sglang_harli.errors import DataError, HarliError, NotFoundError

if TYPE_CHECKING:
    from sglang_harli.client.blocking_client import FinetuneClient

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
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help=f"The server's --harli-finetune-endpoint [env: {ENDPOINT_ENV}; default: {DEFAULT_ENDPOINT}]",
    ),
]
CurveKeys = Annotated[
    str | None,
    typer.Option(
        "--curve-keys",
        help=f"Folder with server.key and client.key_secret [env: {CURVE_KEYS_ENV}; default: none]",
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
    curve_keys: str | None = None

    def client(self) -> FinetuneClient:
        from sglang_harli.client.blocking_client import FinetuneClient

        return FinetuneClient(self.endpoint, curve_keys=self.curve_keys, on_connection=notice)

    def show(self, value: Any, lines: Callable[[], Iterator[str]]) -> None:
        if self.json:
            print_json(value)
        else:
            for line in lines():
                say(line)


def say(line: str) -> None:
    from sglang_harli.tools import terminal

    terminal.say(line)


def notice(line: str) -> None:
    """To stderr."""
    from sglang_harli.tools import terminal

    terminal.say(line, to_stderr=True)


def print_json(value: Any) -> None:
    import msgspec

    from sglang_harli.tools import terminal

    terminal.say_json(msgspec.to_builtins(value))


@contextmanager
def session(ctx: typer.Context, endpoint: str | None, as_json: bool) -> Iterator[Session]:
    """Merges the options before and after the command; prints errors and sets exit codes."""
    outer: Session = ctx.obj
    merged = Session(endpoint or outer.endpoint, as_json or outer.json, outer.curve_keys)
    try:
        yield merged
    except HarliError as error:
        report(error, merged.json)
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)
        raise typer.Exit(code) from error


def report(error: HarliError, as_json: bool) -> None:
    """One line on stderr per problem; with --json also the whole as an object on stdout."""
    # The message of a data error repeats its first lines at fault, which follow.
    headline, refused, _ = (
        error.message.partition(" not accepted: ") if error.details else (error.message, "", "")
    )
    notice(f"error: {headline}{refused.removesuffix(': ')}")
    for lines, reason, _ in errors.grouped(error.details):
        notice(f"  {lines}: {reason}")
    if as_json:
        print_json(
            {"error": {name: getattr(error, name) for name in ("code", "message", "param", "details")}}
        )


def pair(text: str, example: str = "n_epochs=3") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise errors.ConfigError(
            f"{text!r} is not accepted: give key=value, for example {example}", param=text
        )
    return name.strip().replace("-", "_"), value.strip()

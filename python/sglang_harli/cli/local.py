"""Commands that need no server: a model to try things out with, and the check of training data."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sglang_harli.cli.session import AsJson, Endpoint, Session, notice, print_json, report, session
from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import ConfigError, DataError

app = typer.Typer()

DataFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="JSONL, a JSON array, CSV or Parquet (the first three also in gzip); or a folder of Parquet files, or saved by datasets.",
    ),
]


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
            help="About how long to pretrain on two idle cores, loading not counted; 0: random weights [default: by size, 12 for tiny]"
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
            report=notice,
        )
        current.show(
            made, lambda: iter([f"{made['path']}: {arch}, {made['vocab_size']} tokens, loss {made['loss']}"])
        )


@app.command("make-keys")
def make_keys(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Gets the folders server and client.")],
    as_json: AsJson = False,
) -> None:
    """Make CURVE keys for a server that is reached over a network, and for its first client."""
    with session(ctx, None, as_json) as current:
        from sglang_harli.protocol import curve_keys

        server, client = curve_keys.make_keys(folder)
        current.show(
            {"server": str(server), "client": str(client)},
            lambda: iter(
                [
                    f"server: --harli-curve-keys {server}",
                    f"client: harli --curve-keys {client} (copy that folder to the client)",
                ]
            ),
        )


@app.command("check-data")
def check_data(
    ctx: typer.Context,
    data: DataFile,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model that is (or will be) served, to check without a server "
            "[default: the running server checks the file]"
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens [default: the model's limit]")
    ] = None,
    on_overflow: Annotated[str, typer.Option(help="error, truncate or drop longer rows")] = "error",
    tokenizer_path: Annotated[str | None, typer.Option(help="With --model: as for serving.")] = None,
    revision: Annotated[str | None, typer.Option(help="With --model: as for serving.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --model: as for serving.")
    ] = False,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE.jinja", help="With --model: as for serving.")
    ] = None,
    hf_chat_template_name: Annotated[str | None, typer.Option(help="With --model: as for serving.")] = None,
    default_chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="With --model: as for serving.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="With --model: as for serving.")] = None,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
) -> None:
    """Validate training data, and show what would be learned: by the running server, or by --model
    without one."""
    serving = {
        "tokenizer_path": tokenizer_path,
        "revision": revision,
        "trust_remote_code": trust_remote_code or None,
        "chat_template": chat_template,
        "hf_chat_template_name": hf_chat_template_name,
        "chat_template_kwargs": _json_object(default_chat_template_kwargs),
        "context_length": context_length,
    }
    given = {name: value for name, value in serving.items() if value is not None}
    with session(ctx, endpoint, as_json) as current:
        if model is not None:
            from sglang_harli.tools import check_data as tool

            flags = TokenizerFlags(model_path=model, **{"tokenizer_path": model, **given})
            found = tool.check_data(data, flags, max_seq_length=max_seq_length, on_overflow=on_overflow)
        else:
            found = _by_the_server(current, data, given, max_seq_length, on_overflow)
        if current.json:
            print_json(found)
        else:
            from sglang_harli.cli import view

            view.data_report(found)
        if not found["ok"]:
            report(DataError(found["message"], details=found["bad_lines"]), as_json=False)
            raise typer.Exit(3)


def _by_the_server(
    current: Session, data: str, given: dict[str, Any], max_seq_length: int | None, on_overflow: str
) -> dict[str, Any]:
    """``given``: flags of serving, which only a check without a server takes."""
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names}: the running server has its own; give --model too, to check without it")
    pairs: dict[str, Any] = {"on_overflow": on_overflow}
    if max_seq_length is not None:
        pairs["max_seq_length"] = max_seq_length
    with current.client() as client:
        return client.check(data, **pairs)


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter("give a JSON object", param_hint="--default-chat-template-kwargs")
    return found

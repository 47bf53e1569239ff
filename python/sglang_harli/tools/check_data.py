"""``harli check-data``: rows, bad lines, lengths and what is learned of a data file.  Uses the
service's own code, so the result is the same (but for limits on rank and memory)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_harli.client.data_source import DataSource, as_text, open_file
from sglang_harli.config import TokenizerFlags
from sglang_harli.errors import ConfigError, DataError, HarliError
from sglang_harli.protocol.public import MAX_FRAME_BYTES, OVERFLOWS
from sglang_harli.service.data.report import data_report
from sglang_harli.service.rows.encoder import RowEncoder
from sglang_harli.service.tokenizer import model_files, own_tokenizer


def check_data(
    data: str | Path,
    flags: TokenizerFlags,
    *,
    max_seq_length: int | None = None,
    on_overflow: str = "error",
) -> dict[str, Any]:
    """Validate a training file, or a folder of rows, against the tokenizer and chat template of a
    server with ``flags``.

    Hides torch from this process, as the service does: call it from a process of its own.
    ``max_seq_length``: longest row in tokens; default: the model's limit.  Returns
    ``service.data.report.data_report``.

    Raises:
        ConfigError: the model's tokenizer cannot be loaded, or an option is not accepted.
        DataError: the file cannot be read.
    """
    path = Path(data)
    limit = _limit(flags, max_seq_length, on_overflow)
    try:
        with _file(path) as file:
            tokenizer = RowEncoder(_load(flags))
            found = data_report(
                file, tokenizer, name=as_text(path.name), max_length=limit, on_overflow=on_overflow
            )
    except OSError as trouble:
        raise DataError(
            f"{as_text(path.name)} cannot be read: {trouble.strerror or trouble}",
            code="unreadable_file",
            param="data",
        ) from trouble
    return found | {"file": as_text(str(path))}


@contextlib.contextmanager
def _file(path: Path) -> Iterator[Path]:
    """The file itself; a folder's rows as a file, which is gone afterwards."""
    if not path.is_dir():
        open_file(path).close()
        yield path
        return
    with DataSource(path) as source, tempfile.NamedTemporaryFile(suffix=".jsonl") as made:
        for at in range(0, source.size, MAX_FRAME_BYTES):
            made.write(source.read(at, MAX_FRAME_BYTES))
        made.flush()
        yield Path(made.name)


def _limit(flags: TokenizerFlags, max_seq_length: int | None, on_overflow: str) -> int | None:
    """The longest row that is accepted, None where the model's own files do not say."""
    if on_overflow not in OVERFLOWS:
        raise ConfigError(
            f"on_overflow={on_overflow!r} is not accepted: give one of {', '.join(OVERFLOWS)}",
            param="on_overflow",
        )
    try:
        limit = model_files.model_length(flags)
    except HarliError as error:
        raise ConfigError(error.message, param="model") from error
    if max_seq_length is not None and not 2 <= max_seq_length <= (limit or max_seq_length):
        raise ConfigError(
            f"max_seq_length={max_seq_length} is not accepted: give at least 2"
            + (f" and at most the model's limit, {limit} tokens" if limit else ""),
            param="max_seq_length",
        )
    return max_seq_length or limit


def _load(flags: TokenizerFlags) -> Any:
    path = flags.tokenizer_path
    if path.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise ConfigError(
            f"{path}: no such folder: give the folder or hub id of the served model", param="model"
        )
    try:
        return own_tokenizer.load(flags)
    except HarliError as error:
        raise ConfigError(
            f"{error.message}: give the folder or hub id of the served model, and the server's flags",
            param="model",
        ) from error

"""The only place that writes what commands print, to terminals and pipes of any encoding.

``prepare`` replaces ``sys.stdout`` and ``sys.stderr`` by streams that escape what would steer a
terminal and what cannot be encoded.  rich writes to ``unescaped``: its texts are escaped before.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

from sglang_harli.protocol.escaping import escaped, json_text

BROKEN_PIPE = 141  # the exit code of other programs whose reader has gone: 128 and SIGPIPE's number


class OutputError(Exception):
    """What was printed cannot be written: the reader has gone, the disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.exit_code = BROKEN_PIPE if error.errno == errno.EPIPE else 1


class _Stream(io.TextIOBase):
    """A text stream that never fails on a character and never passes a control character on.

    Args:
        escape: control characters are escaped here.
        quiet: write failures are ignored: there is nothing left to report them to.
    """

    def __init__(self, inner: TextIO, *, escape: bool, quiet: bool) -> None:
        self._inner, self._escape, self._quiet = inner, escape, quiet
        self.unescaped: TextIO = _Stream(inner, escape=False, quiet=quiet) if escape else self  # type: ignore[assignment]

    def write(self, text: str) -> int:
        return self._do(self._inner.write, escaped(text, lines=True) if self._escape else text)

    def flush(self) -> None:
        self._do(self._inner.flush)

    def _do(self, operation: Any, *args: Any) -> Any:
        try:
            return operation(*args)
        except OSError as error:
            _discard(self._inner)
            if not self._quiet:
                raise OutputError(error) from error
            return 0

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._inner.isatty()

    def fileno(self) -> int:
        return self._inner.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._inner.encoding or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._inner.errors


def _discard(inner: TextIO) -> None:
    """Drop what is in the buffers: at its end Python would try to write it again, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, inner.fileno())
    os.close(nowhere)


def prepare() -> None:
    """Make the standard streams safe to print to; once, before anything is printed."""
    for descriptor in range(3):  # a closed one would become the number of the next file or socket
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _prepared(sys.stdout, quiet=False)
    sys.stderr = _prepared(sys.stderr, quiet=True)


def _prepared(stream: TextIO | None, *, quiet: bool) -> Any:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Stream(stream, escape=True, quiet=quiet)


def say(line: str, *, to_stderr: bool = False) -> None:
    """Print one line: what it quotes makes no second one."""
    print(escaped(line), file=sys.stderr if to_stderr else sys.stdout, flush=True)


def say_json(value: Any) -> None:
    """Print plain values as JSON, indented on a terminal."""
    out = sys.stdout
    print(json_text(value, encoding=out.encoding or "utf-8", indent=2 if out.isatty() else None), flush=True)


def unescaped(stream: TextIO) -> TextIO:
    """Where rich may write to."""
    return getattr(stream, "unescaped", stream)

"""``harli`` run many times at the price of one start: a process that has imported it forks for each
command.

What a command writes goes to files, and a command may get any bytes as arguments, any encoding, and
streams that are closed, full or without a reader.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).parent.parent)
_START = "from support import cli_process; cli_process.serve(sys.argv[1])"


@dataclass(frozen=True)
class Done:
    code: int
    out: bytes
    err: bytes


class CliProcess:
    """A context manager."""

    def __enter__(self) -> CliProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="harli-cli-")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {TESTS!r}); {_START}", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "HARLI_ENDPOINT"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def run(
        self, *args: str | bytes, encoding: str = "utf-8", out: str = "file", err: str = "file", **env: str
    ) -> Done:
        """``out``, ``err``: file, closed, full (a disk without room) or pipe (its reader has
        gone)."""
        wanted = [os.fsencode(arg).hex() for arg in args]
        order = {"args": wanted, "encoding": encoding, "out": out, "err": err, "env": env}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        folder = Path(self._folder.name)
        return Done(code, (folder / "out").read_bytes(), (folder / "err").read_bytes())


def _stream(descriptor: int, kind: str, path: str, encoding: str) -> Any:
    """The standard stream as Python would have made it."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if kind == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    elif kind == "pipe":
        reader, target = os.pipe()
        os.close(reader)
    os.dup2(target, descriptor)
    os.close(target)
    if kind == "closed":
        os.close(descriptor)
        return None
    file = open(descriptor, "wb", closefd=False)  # noqa: SIM115  (until the process ends)
    return io.TextIOWrapper(
        file, encoding=encoding, errors="strict" if descriptor == 1 else "backslashreplace"
    )


def _command(order: dict[str, Any], folder: str) -> int:
    from sglang_harli.cli import main

    os.environ.update(order["env"])
    sys.argv = ["harli", *(os.fsdecode(bytes.fromhex(arg)) for arg in order["args"])]
    sys.stdout = _stream(1, order["out"], f"{folder}/out", order["encoding"])
    sys.stderr = _stream(2, order["err"], f"{folder}/err", order["encoding"])
    try:
        main.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def serve(folder: str) -> None:
    from sglang_harli.service.tokenizer import hidden_torch

    hidden_torch.hide()
    from transformers import AutoTokenizer  # noqa: F401

    import sglang_harli.cli.view
    import sglang_harli.tools.check_data  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _command(json.loads(line), folder)
                for stream in (sys.stdout, sys.stderr):  # as at the end of an interpreter
                    stream.flush()
            except BaseException:
                with open(f"{folder}/err", "a") as file:
                    traceback.print_exc(file=file)
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)

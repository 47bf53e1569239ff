"""The end of a server, and that no process of it is left: not even one that has lost its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil

from support.server import Server

MARK = "TEST_SERVER_MARK"
GONE_S = 60.0  # SGLang drains requests for at most 15 s
POLL_S = 0.05


def new_mark() -> dict[str, str]:
    """For ``start_server(env=...)``: a variable that every process of that server carries, and no
    other."""
    return {MARK: uuid.uuid4().hex}


def marked(mark: str) -> list[str]:
    """Live processes that carry the mark (``NAME=value``) in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, psutil.Error):
            if mark.encode() in (folder / "environ").read_bytes():
                process = psutil.Process(int(folder.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
    return found


def assert_all_end(server: Server, how: signal.Signals, limit_s: float = GONE_S) -> None:
    """The launcher's main process gets the signal; then nothing of the server is left."""
    [mark] = [f"{k}={v}" for k, v in psutil.Process(server.pid).environ().items() if k == MARK]
    family = server.family()
    assert len(marked(mark)) >= 1
    os.kill(server.pid, how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(limit_s)
    deadline = time.monotonic() + limit_s
    while left := [*marked(mark), *(str(p) for p in server.family())]:
        assert time.monotonic() < deadline, f"{limit_s:g} s after {how.name} these are left: {left}"
        time.sleep(POLL_S)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

"""A Python process of a user that has no entry in the passwd file; for tests that run as root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

UID = 54321
needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="only root with setpriv can become another user",
)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may write; pytest's own are closed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def run_python(script: str, timeout_s: float = 300.0, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` as ``UID``, with the path and these variables alone; skips where he cannot
    read Python's files."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}

    def run(text: str) -> subprocess.CompletedProcess[str]:
        # setpriv keeps root's rights until the interpreter runs, which may lie in a home of root's
        become = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
        return subprocess.run(
            [*become, sys.executable, "-c", text],
            env=kept | environ,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    if run("import encodings.idna, numpy, sglang_harli.core").returncode:
        pytest.skip("another user cannot read this installation")
    return run(script)

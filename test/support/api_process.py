"""The routes of files and fine-tuning in a process of their own, so that its memory is theirs.

``python -m support.api_process ENDPOINT [OPTION=VALUE ...]`` serves until its stdin is closed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from support.api_server import ApiServer
from support.project_files import ROOT


class ApiProcess:
    """Such a process; ``base_url``: for the openai client."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        given = [f"{name}={value}" for name, value in options.items()]
        path = f"{ROOT / 'test'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.api_process", endpoint, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.base_url = self._process.stdout.readline().strip()
        assert self.base_url, "it did not start"

    def stop(self) -> None:
        self._process.communicate(timeout=60)


def main() -> None:
    endpoint, *given = sys.argv[1:]
    server = ApiServer(endpoint, **dict(option.split("=", 1) for option in given)).start()
    print(server.base_url, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()

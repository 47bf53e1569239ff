"""The real finetune service as a process, without a server around it: jobs are accepted and
wait."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig


class ServiceProcess:
    """Starts on first use of ``start``; the run directory outlives a restart, ``close`` removes
    it."""

    def __init__(self, model_path: str, served_model_name: str = "base") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="harli-test-"))
        self.run_dir = self.folder / "runs"
        self.endpoint = f"ipc://{self.folder}/public.sock"
        self.log = self.folder / "service.log"
        self._config = ServiceConfig(
            options=HarliOptions(finetune_endpoint=self.endpoint, run_dir=str(self.run_dir)),
            model_path=model_path,
            tokenizer_path=model_path,
            served_model_name=served_model_name,
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> ServiceProcess:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_harli.service.app"],
                env=os.environ | {SERVICE_ENV: self._config.to_json()},
                stdout=log,
                stderr=log,
            )
        if wait:
            with FinetuneClient(self.endpoint) as client:
                client.status()
        return self

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def close(self) -> None:
        self.kill()
        for folder in (
            run_paths.ipc_dir(str(self.run_dir)),
            run_paths.shm_dir(str(self.run_dir)),
            self.folder,
        ):
            shutil.rmtree(folder, ignore_errors=True)

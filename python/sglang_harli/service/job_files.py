"""A job's folder: what stands where, and the readable copies of the store in it.

``job.json``, ``events.jsonl`` and ``metrics.jsonl`` follow the store, which is the truth: whatever a
crash leaves out or tears is completed at the next write.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson

from sglang_harli.fault_points import Write, reach
from sglang_harli.protocol.public import Event, Job

INCOMING = ".incoming-"  # a folder of a job that is not accepted yet


class JobPaths:
    """The places of one job under the run directory."""

    def __init__(self, run_dir: Path, job: str) -> None:
        self.folder = run_dir / job
        self.data = self.folder / "data"
        self.checkpoints = self.folder / "checkpoints"
        self.adapter = self.folder / "adapter"
        self.job = self.folder / "job.json"
        self.events = self.folder / "events.jsonl"
        self.metrics = self.folder / "metrics.jsonl"


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Every file and folder under ``folder`` reaches the disk."""
    for root, _folders, files in os.walk(folder):
        for name in files:
            fd = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_folder(Path(root))


class JobMirror:
    """Writes the readable copies.

    Args:
        run_dir: the run directory.
        missing: reads events (job, after, limit) from the store, to complete a copy that fell behind.
    """

    def __init__(self, run_dir: Path, missing: Callable[[str, int, int], list[Event]]) -> None:
        self._run_dir = run_dir
        self._missing = missing
        self._written: dict[str, int] = {}  # job -> id of the last event in both files

    def job(self, job: Job) -> None:
        path = JobPaths(self._run_dir, job.id).job
        temporary = path.with_suffix(".tmp")
        reach(Write.MIRROR)
        temporary.write_bytes(orjson.dumps(msgspec.to_builtins(job), option=orjson.OPT_INDENT_2))
        os.replace(temporary, path)

    def events(self, job: str, upto: int) -> None:
        """Bring both files to event ``upto``.

        Raises:
            OSError: the disk is full or the folder is gone; the next call tries again.
        """
        paths = JobPaths(self._run_dir, job)
        last = self._written.pop(job, None)
        told = measured = last or 0
        if last is None:  # a crash may have left each file behind by as much as it likes
            told, measured = _repair(paths.events, "id"), _repair(paths.metrics, "event")
            last = min(told, measured)
        while last < upto:
            batch = self._missing(job, last, 1000)
            if not batch:
                break
            metrics = [e for e in batch if e.type == "step_metrics" and e.id > measured]
            _append(paths.metrics, [{"event": e.id, "time": e.created_at, **e.data} for e in metrics])
            _append(paths.events, [msgspec.to_builtins(e) for e in batch if e.id > told])
            last = batch[-1].id
        self._written[job] = last


def _append(path: Path, rows: list[dict]) -> None:
    if rows:
        reach(Write.MIRROR)
        with path.open("ab") as file:
            file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def _last(path: Path, key: str) -> int:
    """The id in the file's last whole line (0: none)."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            tail = file.read()
    except FileNotFoundError:
        return 0
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    return int(orjson.loads(lines[-1])[key]) if lines else 0


def _repair(path: Path, key: str) -> int:
    """Cut off a line that a crash has torn; returns the last whole line's id."""
    if path.exists():
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 65536)
            file.seek(start)
            end = start + file.read().rfind(b"\n") + 1
            if end < size:
                file.truncate(end)
    return _last(path, key)

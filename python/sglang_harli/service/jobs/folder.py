"""A job's folder: its paths, and the readable copies of the store in it.

``job.json``, ``events.jsonl`` and ``metrics.jsonl`` follow the store, which is the truth: what a
crash leaves out or tears is completed at the next write.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson

from sglang_harli.failpoints import WriteFailpoint, failpoint
from sglang_harli.protocol.public import Event, Job

TAIL_BYTES = 1 << 20  # more than the longest event
INCOMING = ".incoming-"  # a folder of a job that is not accepted yet


class JobPaths:
    """The places of one job under the run directory."""

    def __init__(self, run_dir: Path, job: str) -> None:
        self.folder = run_dir / job
        self.data = self.folder / "data"
        self.checkpoints = self.folder / "checkpoints"
        self.adapter = self.folder / "adapter"
        self.adapters = self.folder / "adapters"  # of checkpoints
        self.job = self.folder / "job.json"
        self.events = self.folder / "events.jsonl"
        self.metrics = self.folder / "metrics.jsonl"


def _fsync(path: Path, flags: int = os.O_RDONLY) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def fsync_tree(folder: Path) -> None:
    """Every file and folder under ``folder`` reaches the disk."""
    for root, _folders, files in os.walk(folder):
        for name in files:
            _fsync(Path(root) / name)
        fsync_folder(Path(root))


class JobMirror:
    """Writes the readable copies; ``missing`` reads events (job, after, limit) from the store."""

    def __init__(self, run_dir: Path, missing: Callable[[str, int, int], list[Event]]) -> None:
        self._run_dir = run_dir
        self._missing = missing
        self._written: dict[str, int] = {}  # job -> id of the last event in both files

    def has(self, job: str) -> bool:
        """Whether the job still has a folder."""
        return JobPaths(self._run_dir, job).folder.is_dir()

    def forget(self, job: str) -> None:
        """Nothing more is expected of this job."""
        self._written.pop(job, None)

    def job(self, job: Job) -> None:
        """Bring job.json up to date; after an OSError the next call tries again."""
        path = JobPaths(self._run_dir, job.id).job
        content = orjson.dumps(msgspec.to_builtins(job), option=orjson.OPT_INDENT_2)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return
        temporary = path.with_suffix(".tmp")
        failpoint(WriteFailpoint.MIRROR)
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def events(self, job: str, upto: int) -> None:
        """Bring both files to event ``upto``.  Raises OSError (the next call tries again);
        NotReadyError: the store cannot be read."""
        paths = JobPaths(self._run_dir, job)
        last = self._written.pop(job, None)
        shown = measured = last or 0
        if last is None:  # a crash may have left each file behind by as much as it likes
            shown, measured = _repair(paths.events, "id"), _repair(paths.metrics, "event")
            last = min(shown, measured)
        while last < upto:
            batch = self._missing(job, last, 1000)
            if not batch:
                break
            metrics = [e for e in batch if e.type == "step_metrics" and e.id > measured]
            _append(paths.metrics, [{"event": e.id, "time": e.created_at, **e.data} for e in metrics])
            _append(paths.events, [msgspec.to_builtins(e) for e in batch if e.id > shown])
            last = batch[-1].id
        self._written[job] = last


def _append(path: Path, rows: list[dict]) -> None:
    if rows:
        failpoint(WriteFailpoint.MIRROR)
        with path.open("ab") as file:
            file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def _repair(path: Path, key: str) -> int:
    """Cut off a line that a crash has torn; returns the id in the last whole line (0: none). A file
    that does not end like one of ours is emptied: the store has it all."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return 0
    with file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        end = tail.rfind(b"\n") + 1
        begin = tail.rfind(b"\n", 0, max(0, end - 1)) + 1
        try:
            if start and not begin:
                raise ValueError("the last line is longer than any of ours")
            last = int(orjson.loads(tail[begin:end])[key]) if end else 0
        except (ValueError, KeyError, TypeError):
            last, start, end = 0, 0, 0
        if start + end < size:
            file.truncate(start + end)
        return last

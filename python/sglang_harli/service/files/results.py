"""Result files: the metrics of a job that succeeded, as a CSV file of the file store.

A row is an optimizer step, with what was measured of it last; a job that went back to a checkpoint
has its steps once.  A value that does not exist is an empty cell.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import logging
import math
import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError
from sglang_harli.failpoints import FileFailpoint, WriteFailpoint, failpoint
from sglang_harli.protocol.public import Event
from sglang_harli.service.files.file_store import FileStore
from sglang_harli.service.files.streams import Whole
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.registry import JobRegistry

logger = logging.getLogger(__name__)

FILENAME = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
# By type of event: a column, and the value's name in the event.
SOURCES = {
    "step_metrics": {"train_loss": "loss", "train_accuracy": "train_mean_token_accuracy"},
    "eval_metrics": {
        "valid_loss": "valid_loss",
        "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    },
}
PAGE = 1000  # events that are read at once
AGAIN_S = 60.0  # after a file could not be made


class ResultFiles:
    """Makes the result files of jobs whose data are files.  ``readers``: threads that read the
    store."""

    def __init__(self, registry: JobRegistry, files: FileStore, readers: Executor) -> None:
        self._registry = registry
        self._files = files
        self._readers = readers
        self._wake = asyncio.Event()
        self._said: dict[str, str] = {}  # job -> why its file is not there yet
        registry.listeners.append(self._changed)

    async def before_end(self, job: str) -> tuple[str, ...]:
        """The result files of a job that is about to succeed; none where they cannot be made now:
        they are made later."""
        record = self._registry.get(job)
        if record.training_file is None or record.result_files:
            return record.result_files
        try:
            return (await self._make(job),)
        except HarliError as error:
            self._say(job, error)
            return ()

    async def run(self) -> None:
        """Make the files that jobs lack: what a crash or a full disk has left out."""
        while True:
            self._wake.clear()
            lacking = [record.id for record in self._registry.all() if _lacks(record)]
            for job in lacking:
                try:
                    file = await self._make(job)
                except HarliError as error:
                    self._say(job, error)
                    continue
                self._registry.apply(transitions.has_results(self._registry.get(job), file))
            if not any(_lacks(record) for record in self._registry.all()):
                await self._wake.wait()
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), AGAIN_S)

    def _changed(self, record: JobRecord) -> None:
        if _lacks(record):
            self._wake.set()

    def _say(self, job: str, error: HarliError) -> None:
        if self._said.get(job) != error.message:
            self._said[job] = error.message
            logger.warning("job %s: its result file cannot be made yet: %s", job, error.message)

    async def _make(self, job: str) -> str:
        """The id of the job's file; one that an earlier try has made is found again.

        Raises:
            HarliError: the store cannot be read, or the disk refuses.
        """
        await self._registry.durable()  # its last metrics too
        # No client's key holds a line break: the file of this key is this job's.
        file = await self._files.add_result(FILENAME, self._writer(job), key=f"result\n{job}")
        failpoint(FileFailpoint.RESULT_STORED)
        self._said.pop(job, None)
        return file.id

    def _writer(self, job: str) -> Callable[[Path], Awaitable[Whole]]:
        async def write(place: Path) -> Whole:
            try:
                # A temporary database on the disk: steps come in any order, and there may be many.
                with contextlib.closing(sqlite3.connect("", check_same_thread=False)) as rows:
                    after: int | None = 0
                    while after is not None:  # a page at a time: others' questions come between
                        after = await asyncio.get_running_loop().run_in_executor(
                            self._readers, self._add_page, rows, job, after
                        )
                    return await self._files.in_thread(lambda: write_csv(rows, place))
            except sqlite3.Error as error:
                raise HarliError(f"its metrics cannot be sorted ({error})", code="storage") from error

        return write

    def _add_page(self, rows: sqlite3.Connection, job: str, after: int) -> int | None:
        """Read a page of events; the id to go on after, None at their end."""
        events = self._registry.store.events(job, after, PAGE, types=tuple(SOURCES))
        add_metrics(rows, events)
        return events[-1].id if len(events) == PAGE else None


def _lacks(record: JobRecord) -> bool:
    done = record.status == JobStatus.SUCCEEDED
    return done and record.training_file is not None and not record.result_files


# ------------------------------------------------------------------ in threads
def add_metrics(rows: sqlite3.Connection, events: Iterable[Event]) -> None:
    """Add events to the table of rows, which may be new; what came last counts."""
    values = ", ".join(f"{name} REAL" for name in COLUMNS[1:])
    rows.execute(f"CREATE TABLE IF NOT EXISTS metrics (step INTEGER PRIMARY KEY, {values})")
    for event in events:
        step = event.data.get("step")
        if not isinstance(step, int):  # an event that could not be read
            continue
        found = {column: _number(event.data.get(name)) for column, name in SOURCES[event.type].items()}
        names, marks = ", ".join(found), ", ".join("?" * len(found))
        update = ", ".join(f"{name} = excluded.{name}" for name in found)
        rows.execute(
            f"INSERT INTO metrics (step, {names}) VALUES (?, {marks}) ON CONFLICT (step) DO UPDATE SET {update}",
            (step, *found.values()),
        )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def write_csv(rows: sqlite3.Connection, place: Path) -> Whole:
    """The table as a file, whose bytes are durable when they have their name (``settle``)."""
    failpoint(WriteFailpoint.FILE)
    with place.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows.execute(f"SELECT {', '.join(COLUMNS)} FROM metrics ORDER BY step"))
    with place.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
        return Whole(place, written.tell(), digest)

"""Whether the job store of a run directory can be read, by this harli, and all of its jobs and
files.

It is opened for reading only; of a store that no server has open, and whose log is empty, not even
a lock is taken.  Where a server was killed, SQLite may make the index of its log (-shm) again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sglang_harli.errors import HarliError
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.finding import Finding, ok, problem, skipped, together, warning

WAIT_S = 1.0  # for a store that is locked
CHECKED_BYTES = 64 << 20  # a larger one is not read whole
SHOWN = 5  # jobs that are named
RESTORE = "put harli.db back from a backup, with the folders of the jobs, or give another --harli-run-dir"


def job_store(asked: Asked) -> Finding:
    from sglang_harli.service.jobs.store import STORE_FILE

    return judge(asked.run_dir / STORE_FILE, in_use=proc.lock_holder(asked.run_dir / "lock") is not None)


def judge(path: Path, *, in_use: bool) -> Finding:
    """``in_use``: a server has it open, so that it is not checked as a whole."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return skipped(f"there is no {path} yet", "the first start of a server in its folder makes it")
    except OSError as error:
        return problem(f"{path}: {error.strerror}", "run as the user of the server")
    try:
        with contextlib.closing(_opened(path, in_use)) as store:
            if not in_use and size <= CHECKED_BYTES:
                (verdict,) = store.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    return problem(f"{path} is damaged: {verdict}", RESTORE)
            return _contents(path, store)
    except sqlite3.Error as error:
        return problem(
            f"{path} cannot be read: {error}", f"run as the user of the server; if it is damaged, {RESTORE}"
        )


def _opened(path: Path, in_use: bool) -> sqlite3.Connection:
    log = Path(f"{path}-wal")
    alone = not in_use and not (log.exists() and log.stat().st_size)
    mode = "mode=ro&immutable=1" if alone else "mode=ro"
    store = sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True, timeout=WAIT_S, isolation_level=None)
    # As the service reads it: a damaged text makes one record unusable.
    store.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return store


def _contents(path: Path, store: sqlite3.Connection) -> Finding:
    from sglang_harli.service.jobs.store import READS, SCHEMA

    tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"jobs", "events", "settings"} <= tables:
        return problem(f"{path} is not a job store", "give another --harli-run-dir")
    row = store.execute("SELECT value FROM settings WHERE key = 'schema'").fetchone()
    if row is None or row[0] not in READS:
        return problem(
            f"{path} has schema {row and row[0]}, this harli reads {SCHEMA}",
            "serve with the harli that made it, or give another --harli-run-dir",
        )
    rows = store.execute("SELECT id, status, body FROM jobs ORDER BY number").fetchall()
    counts = Counter(status for _, status, _ in rows)
    jobs = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    found = [ok(f"{path} has schema {row[0]}, jobs: {jobs}")]
    unreadable = {job: why for job, _, body in rows if (why := _trouble(body)) is not None}
    if unreadable:
        mend = "submit their data again: they are kept in the folders of the jobs"
        found.append(_left_aside("jobs", unreadable, len(rows), mend))
    if "objects" in tables:
        found += _files(store)
    return together(found)


def _left_aside(what: str, unreadable: dict[str, str], count: int, mend: str) -> Finding:
    named = "; ".join(f"{name}: {why}" for name, why in list(unreadable.items())[:SHOWN])
    return warning(f"{len(unreadable)} of {count} {what} cannot be read and are left aside ({named})", mend)


def _files(store: sqlite3.Connection) -> Iterator[Finding]:
    """Files, uploads and their parts that cannot be read."""
    from sglang_harli.service.files.records import decoded

    rows = store.execute("SELECT id, kind, body FROM objects ORDER BY id").fetchall()
    unreadable = {}
    for name, kind, body in rows:
        try:
            decoded(kind, body or "")
        except HarliError as error:
            unreadable[name] = error.message
    if unreadable:
        mend = "send them again: their bytes are kept in the run directory, in files and parts"
        yield _left_aside("files and uploads", unreadable, len(rows), mend)


def _trouble(body: Any) -> str | None:
    from sglang_harli.service.jobs.record_encoding import RecordError, read_record

    try:
        read_record(body)
    except RecordError as error:
        return str(error)
    return None

"""The job store: jobs, their events, files and a few settings in one database (SQLAlchemy).

SQLite in write-ahead mode by default; any other SQLAlchemy URL works too.  Only the journal's
writer and readers of events use it, each in a thread.  A commit is durable when ``write`` returns.
A database that is locked, full or away is a NotReadyError until it is back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.failpoints import WriteFailpoint, failpoint
from sglang_harli.protocol.public import CODING_ERRORS, Event
from sglang_harli.service.jobs.record_encoding import RecordError, read_event, read_record, stored
from sglang_harli.service.jobs.transitions import JobRecord

logger = logging.getLogger(__name__)

STORE_FILE = "harli.db"
SCHEMA = "2"
READS = ("1", SCHEMA)  # an earlier store is read as it is, and is of this schema from then on
LOCKED_MS = 2000  # a database that another process has locked is waited for; then the caller says so

_metadata = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("status", sa.String(32), nullable=False, index=True),
    sa.Column("idempotency_key", sa.String(128), unique=True),
    sa.Column("body", sa.Text, nullable=False),
)
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)
_settings = sa.Table(
    "settings",
    _metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


_objects = sa.Table(
    "objects",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)


def sqlite_url(path: Path) -> URL:
    return URL.create("sqlite", database=str(path))  # as text the path might be parsed


class StoredObject(NamedTuple):
    """A file, an upload or a part as the store has it: ``body`` is JSON, None removes it."""

    id: str
    kind: str
    body: str | None


class UnwritableError(HarliError):
    """Records that the database will never take, now or later."""

    code = "store"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A job whose record cannot be read: what its other columns say, and why."""

    id: str
    number: int
    idempotency_key: str | None
    why: str


class JobStore:
    """The jobs and their events in a SQL database; ``unreadable``: what ``jobs`` has left out.
    Raises HarliError: the database cannot be opened, or is of another version of harli."""

    def __init__(self, url: str | URL) -> None:
        address = make_url(url)
        where = address.database if address.get_backend_name() == "sqlite" else address
        self._engine: Engine = sa.create_engine(address)
        if address.get_backend_name() == "sqlite":
            event.listen(self._engine, "connect", _tune_sqlite)
        try:
            _metadata.create_all(self._engine)
            schema = self.setting("schema")
            if schema in (None, *READS[:-1]):
                self.write(settings={"schema": SCHEMA})
        except SQLAlchemyError as error:
            raise HarliError(
                f"the job store {where} cannot be opened: {_why(error)}", code="store"
            ) from error
        except NotReadyError as error:
            raise HarliError(
                f"the job store {where} cannot be opened: {error.message}: end the process that holds it, or make room",
                code="store",
            ) from error
        if schema not in (None, *READS):
            raise HarliError(
                f"the job store {where} has schema {schema}, this harli reads {SCHEMA}: give another --harli-run-dir",
                code="store",
            )
        self.unreadable: list[Unreadable] = []

    # ---- writing
    def write(
        self,
        records: Iterable[JobRecord] = (),
        events: Iterable[Event] = (),
        settings: dict[str, str] | None = None,
        objects: Iterable[StoredObject] = (),
    ) -> None:
        """All of it in one transaction; repeating a write changes nothing.  Raises NotReadyError:
        not now; UnwritableError: never.  Nothing of it was written then."""
        with _trouble("written"), self._engine.begin() as db:
            try:
                failpoint(WriteFailpoint.STORE)
            except OSError as error:  # as the database itself would say it
                raise OperationalError("write", None, error) from error
            for record in records:
                _put(
                    db,
                    _jobs,
                    {"id": record.id},
                    {
                        "number": record.number,
                        "status": str(record.status),
                        "idempotency_key": record.idempotency_key,
                        "body": stored(record),
                    },
                )
            for e in events:
                _put(db, _events, {"job": e.job, "id": e.id}, {"type": e.type, "body": stored(e)})
            for key, value in (settings or {}).items():
                _put(db, _settings, {"key": key}, {"value": value})
            for found in objects:
                if found.body is None:
                    db.execute(sa.delete(_objects).where(_objects.c.id == found.id))
                else:
                    _put(db, _objects, {"id": found.id}, {"kind": found.kind, "body": found.body})

    # ---- reading (NotReadyError where it cannot be read now)
    def jobs(self) -> list[JobRecord]:
        """All jobs in the order of their creation; unreadable records go to ``unreadable``."""
        columns = (_jobs.c.id, _jobs.c.number, _jobs.c.idempotency_key, _jobs.c.body)
        with _trouble("read"), self._engine.connect() as db:
            rows = db.execute(sa.select(*columns).order_by(_jobs.c.number)).all()
        found, self.unreadable = [], []
        for job, number, key, body in rows:
            try:
                found.append(read_record(body))
            except RecordError as error:
                logger.error(
                    "the record of job %s in the job store cannot be read, and is left aside: %s", job, error
                )
                self.unreadable.append(Unreadable(job, number, key, str(error)))
        return found

    def events(self, job: str, after: int, limit: int, *, types: Sequence[str] = ()) -> list[Event]:
        """The job's events with an id above ``after``, oldest first; ``types``: of these alone."""
        query = (
            sa.select(_events.c.id, _events.c.body)
            .where(_events.c.job == job, _events.c.id > after)
            .order_by(_events.c.id)
            .limit(limit)
        )
        if types:
            query = query.where(_events.c.type.in_(types))
        with _trouble("read"), self._engine.connect() as db:
            return [read_event(job, number, body) for number, body in db.execute(query)]

    def events_before(self, job: str, before: int | None, limit: int) -> list[Event]:
        """The job's events with an id below ``before`` (None: all), newest first."""
        query = sa.select(_events.c.id, _events.c.body).where(_events.c.job == job)
        if before is not None:
            query = query.where(_events.c.id < before)
        query = query.order_by(_events.c.id.desc()).limit(limit)
        with _trouble("read"), self._engine.connect() as db:
            return [read_event(job, number, body) for number, body in db.execute(query)]

    def objects(self) -> list[StoredObject]:
        """All files, uploads and parts, in no order."""
        query = sa.select(_objects.c.id, _objects.c.kind, _objects.c.body)
        with _trouble("read"), self._engine.connect() as db:
            return [StoredObject(*row) for row in db.execute(query)]

    def setting(self, key: str) -> str | None:
        with _trouble("read"), self._engine.connect() as db:
            return db.execute(sa.select(_settings.c.value).where(_settings.c.key == key)).scalar_one_or_none()

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def _trouble(what: str) -> Iterator[None]:
    try:
        yield
    except (IntegrityError, DataError, *CODING_ERRORS) as error:  # of what is written, not of the database
        why = _why(error) if isinstance(error, SQLAlchemyError) else str(error)
        raise UnwritableError(f"the job store cannot take it: {why}") from error
    except SQLAlchemyError as error:
        raise NotReadyError(f"the job store cannot be {what}: {_why(error)}") from error


def _why(error: SQLAlchemyError) -> str:
    return str(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else str(error)


def _put(db: sa.Connection, table: sa.Table, key: dict[str, Any], values: dict[str, Any]) -> None:
    """Update or insert (one writer, so nothing comes between)."""
    match = [table.c[name] == value for name, value in key.items()]
    if db.execute(sa.update(table).where(*match).values(**values)).rowcount == 0:
        db.execute(sa.insert(table).values(**key, **values))


def _tune_sqlite(connection: Any, _record: Any) -> None:
    # A damaged text is read too: it makes one record unusable, and not the whole table.
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={LOCKED_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut
    cursor.close()

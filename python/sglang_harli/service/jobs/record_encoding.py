"""A job's record for its readers: the store, the readable copies, clients and the scheduler.

What one of them cannot take is found before the job is accepted, and where a record is read: no
record that is kept can end the journal, a reply or the start of a run.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from sglang_harli.protocol import internal
from sglang_harli.protocol.public import CODING_ERRORS, Event, encode
from sglang_harli.service.jobs.record import JobRecord, public


class RecordError(ValueError):
    """A record that one of its readers cannot take, or that is none: the field and why."""


def stored(value: JobRecord | Event) -> str:
    """A record or an event for the store; raises RecordError."""
    try:
        return msgspec.json.encode(value).decode()
    except CODING_ERRORS as error:
        raise RecordError(f"it cannot be stored: {error}") from error


def check(record: JobRecord) -> None:
    """Raise RecordError unless all readers can take the record, and the store gives it back."""
    body = stored(record)
    try:
        back = msgspec.json.decode(body, type=JobRecord)
    except CODING_ERRORS as error:
        raise RecordError(f"it cannot be read again once it is stored: {error}") from error
    for name in record.__struct_fields__:
        if plain(getattr(back, name)) != plain(getattr(record, name)):
            raise RecordError(f"{name} is not the same once it is stored")
    _check_readers(record)


def plain(value: Any) -> Any:
    """As JSON has it (a tuple is a list): the form in which stored and new values are compared."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return plain(msgspec.to_builtins(value)) if isinstance(value, msgspec.Struct) else value


def _check_readers(record: JobRecord) -> None:
    spec = internal.RunSpec(
        job=record.id, attempt=0, hyperparameters=record.hyperparameters, total_steps=record.total_steps
    )
    try:
        encode(public(record, ""))
        internal.encode(internal.StartRun(spec=spec))
    except CODING_ERRORS as error:
        raise RecordError(f"it cannot be shown or started: {error}") from error


def read_record(body: Any) -> JobRecord:
    """A record of the store; raises RecordError: it is none, or a reader could not take it."""
    try:
        record = msgspec.json.decode(body, type=JobRecord)
    except CODING_ERRORS as error:
        raise RecordError(str(error)) from error
    _check_readers(record)
    return record


def read_event(job: str, number: int, body: Any) -> Event:
    """An event of the store; where its body is none, one that says so in its place."""
    try:
        event = msgspec.json.decode(body, type=Event)
        orjson.dumps(msgspec.to_builtins(event))
        return event
    except CODING_ERRORS as error:
        text = f"what the job store has of this event cannot be read: {error}"
        return Event(id=number, job=job, created_at=0.0, level="error", type="warning", message=text)

"""Which base is served now, and which jobs and adapters belong to it."""

from __future__ import annotations

import msgspec

from sglang_harli.protocol.base_print import BasePrint, difference
from sglang_harli.service.jobs.record import JobRecord

UNKNOWN = "it is not known which weights this server serves since their last update"


class ServedBase:
    """The base of the scheduler's latest hello, compared with the bases that jobs have."""

    def __init__(self) -> None:
        self.base: BasePrint | None = None  # None before a hello: then every job counts as one of it
        self.unknown = False  # since an update of the weights: then no job does
        self._known: dict[tuple[str, ...], BasePrint] = {}  # one object for the many records that have it
        self._unlike: dict[tuple[str, ...], str] = {}  # what was compared with ``base``

    def serve(self, base: BasePrint | None) -> None:
        """What is served from now on; None: not known any more."""
        self.base, self.unknown = base, base is None
        self._unlike.clear()

    def shared(self, record: JobRecord) -> JobRecord:
        """The record with the one object of its base that all records share."""
        if record.base is None:
            return record
        base = self._known.setdefault(_key(record.base), record.base)
        return record if base is record.base else msgspec.structs.replace(record, base=base)

    def other(self, record: JobRecord) -> str:
        """Why the job's base is not the served one, "" where it is."""
        if self.unknown:
            return UNKNOWN
        if record.base is None or self.base is None:
            return ""
        key = _key(record.base)
        found = self._unlike.get(key)
        if found is None:
            found = self._unlike[key] = other_base(record.base, self.base)
        return found


def _key(base: BasePrint) -> tuple[str, ...]:
    return base.model, base.path, base.dtype, base.digest, repr(base.math)


def other_base(own: BasePrint | None, served: BasePrint | None) -> str:
    """The sentence that names a job's base and the served one; "": the same, or not known."""
    unlike = difference(own, served) if own is not None and served is not None else ""
    if not unlike or own is None or served is None:
        return ""
    return f"its base is {own.shown}, and this server serves {served.shown}: {unlike}"

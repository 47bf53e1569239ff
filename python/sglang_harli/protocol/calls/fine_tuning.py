"""What the HTTP process asks about jobs besides the public verbs (``protocol/public.py``), on the
inner endpoint alone."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from sglang_harli.protocol.public import Event

VERBS = ("events_before",)


class EventsBeforeArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``events_before``: a job's events from the newest back; ``before``: those with a lower id."""

    job: str
    before: Annotated[int, Meta(ge=0)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20


class EventsPage(Struct, kw_only=True):
    """Events, newest first."""

    events: list[Event]
    has_more: bool

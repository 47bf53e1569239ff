"""What the HTTP process asks about jobs besides the public verbs (``protocol/public.py``), on the
inner endpoint alone."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from sglang_harli.protocol.public import Event

VERBS = ("events_before", "model_delete", "checkpoints")

ModelName = Annotated[str, Meta(min_length=1, max_length=1024)]


class EventsBeforeArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``events_before``: a job's events from the newest back; ``before``: those with a lower id."""

    job: str
    before: Annotated[int, Meta(ge=0)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20


class CheckpointsArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``checkpoints``: those of a job that are there, the newest first; ``before``: of lower
    steps."""

    job: str
    before: Annotated[int, Meta(ge=0)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 10


class Checkpoint(Struct, kw_only=True):
    """The state of a job after ``step``.  ``model``: the name that answers as it; ``metrics``: what
    is known of it, by OpenAI's names."""

    step: int
    created_at: float
    model: str
    metrics: dict[str, float]


class CheckpointsPage(Struct, kw_only=True):
    """Checkpoints, the newest first."""

    checkpoints: list[Checkpoint]
    has_more: bool


class ModelArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``model_delete``: the name of a job's model."""

    model: ModelName


class ModelDeletion(Struct, kw_only=True):
    """The model is deleted, durably.  ``again``: it was before; ``also``: other names of its
    state, which are deleted with it."""

    model: str
    again: bool
    also: list[str] = []


class EventsPage(Struct, kw_only=True):
    """Events, newest first."""

    events: list[Event]
    has_more: bool

"""Which job an adapter's name belongs to, and which names are served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang_harli.names import checkpoint_name, checkpoint_of
from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.registry import JobRegistry


class Adapter(NamedTuple):
    """The model of a job, or (``step``) its checkpoint of that optimizer step."""

    job: str
    step: int | None = None


class AdapterNames:
    """The adapters of all jobs by name; follows the registry.

    Attributes:
        revision: rises whenever the names that are served are others than before.
    """

    def __init__(self, registry: JobRegistry) -> None:
        self._registry = registry
        self._jobs: dict[str, str] = {}  # adapter name -> job
        self._served: dict[str, tuple[str, ...]] = {}  # job -> the names that it is served under
        self.revision = 0
        for record in registry.all():
            self._note(record)
        registry.listeners.append(self._note)

    def _note(self, record: JobRecord) -> None:
        self._jobs[record.adapter_name] = record.id
        served = served_names(record)
        if served != self._served.get(record.id, ()):
            self._served[record.id] = served
            self.revision += 1

    def find(self, name: str) -> Adapter | None:
        """The adapter of this name, deleted or not; None: no job has made one, or can have."""
        record = self._record(name)
        if record is not None and record.fine_tuned_model == name:
            return Adapter(record.id)
        parts = checkpoint_of(name)
        record = self._record(parts[0]) if parts is not None else None
        return Adapter(record.id, parts[1]) if record is not None and parts is not None else None

    def is_coming(self, name: str) -> bool:
        """Whether the model of this name is being published."""
        record = self._record(name)
        return record is not None and record.publishing

    def _record(self, name: str) -> JobRecord | None:
        job = self._jobs.get(name)
        return self._registry.find(job) if job is not None else None

    def here(self) -> list[str]:
        """The names that are served on the served base."""
        return [name for name, other in self._with_bases() if not other]

    def elsewhere(self) -> dict[str, list[str]]:
        """The names of adapters of other bases, by the sentence on their base."""
        found: dict[str, list[str]] = {}
        for name, other in self._with_bases():
            if other:
                found.setdefault(other, []).append(name)
        return found

    def _with_bases(self) -> Iterator[tuple[str, str]]:
        for job, names in self._served.items():
            if names and (record := self._registry.find(job)) is not None:
                other = self._registry.other_base(record)
                yield from ((name, other) for name in names)


# ------------------------------------------------------------------ of one job
def served_names(record: JobRecord) -> tuple[str, ...]:
    """The names under which a job's adapters answer, those of checkpoints once they were asked
    for."""
    names = [
        checkpoint_name(record.adapter_name, s) for s in record.served_steps if not is_deleted(record, s)
    ]
    if record.fine_tuned_model is not None and not is_deleted(record):
        names.append(record.fine_tuned_model)
    return tuple(names)


def name_of(record: JobRecord, step: int | None = None) -> str:
    """The name of a job's model (None), or of the checkpoint of a step; where they are the same
    state, of the model."""
    is_model = record.fine_tuned_model is not None and step == record.model_step
    return record.adapter_name if step is None or is_model else checkpoint_name(record.adapter_name, step)


def is_deleted(record: JobRecord, step: int | None = None) -> bool:
    """Whether the job's model (None), or the checkpoint of a step, was deleted as a model."""
    names = {name_of(record, step)}
    if step is not None:
        names.add(checkpoint_name(record.adapter_name, step))
    return not names.isdisjoint(record.deleted_models)

"""Which job an adapter's name belongs to, and which names are served."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_harli.service.jobs.record import JobRecord
from sglang_harli.service.jobs.registry import JobRegistry


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

    def find(self, name: str) -> JobRecord | None:
        """The job whose model this is, deleted or not; None: no job has made one of this name."""
        job = self._jobs.get(name)
        record = self._registry.find(job) if job is not None else None
        return record if record is not None and record.fine_tuned_model == name else None

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


def served_names(record: JobRecord) -> tuple[str, ...]:
    """The names under which a job's adapters answer."""
    model = record.fine_tuned_model
    return () if model is None or model in record.deleted_models else (model,)

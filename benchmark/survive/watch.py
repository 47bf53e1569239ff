"""Memory and open files of a server's processes over their lives, and whether either grows.
Standard library and psutil."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

EVERY_S = 5.0
# A process is judged if it lived so long; the beginning of its life is set-up.
JUDGED_S, SETTLED_S, WINDOW_S = 300.0, 180.0, 60.0
# Lives of one role are compared at the greatest of these ages that two of them reached.
EQUAL_AGES_S = (180.0, 90.0, 45.0)
EQUAL_WINDOW_S = 30.0
ROLES = {
    "sglang_harli.service.app": "service",
    "sglang::scheduler": "scheduler",
    "sglang::detoken": "detokenizer",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """``age_s`` since the process began; ``memory``: bytes that are its alone (USS); ``files``:
    descriptors."""

    age_s: float
    memory: int
    files: int


@dataclass
class Life:
    """One process from its start to its end."""

    role: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def lived_s(self) -> float:
        return self.samples[-1].age_s if self.samples else 0.0

    def at(self, age_s: float, width_s: float) -> list[Sample]:
        return [s for s in self.samples if age_s - width_s <= s.age_s <= age_s]


class Watch:
    """Samples the processes of a server; ``lives`` in the order in which they began."""

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self._known: dict[tuple[int, float], Life] = {}

    def look(self, family: Sequence[psutil.Process], root: int) -> None:
        now = time.time()
        for process in family:
            with contextlib.suppress(psutil.Error):
                role = "http" if process.pid == root else _role(process)
                if role is None:
                    continue
                key = (process.pid, process.create_time())
                if key not in self._known:
                    self._known[key] = Life(role, process.pid)
                    self.lives.append(self._known[key])
                memory = process.memory_full_info().uss
                sample = Sample(now - process.create_time(), memory, process.num_fds())
                self._known[key].samples.append(sample)


def _role(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    return next((role for text, role in ROLES.items() if text in line), None)


# ------------------------------------------------------------------ verdicts (pure)
def in_life(life: Life) -> dict[str, Any] | None:
    """Growth from the third minute to the end of a life of at least five; None for a shorter
    one."""
    if life.lived_s < JUDGED_S:
        return None
    before, after = life.at(SETTLED_S + WINDOW_S, WINDOW_S), life.at(life.lived_s, WINDOW_S)
    return {"role": life.role, "pid": life.pid, "lived_s": round(life.lived_s), **_compare(before, after)}


def over_run(lives: Sequence[Life], role: str) -> dict[str, Any] | None:
    """The first life of a role against the last, at equal age; None where no two were seen at
    one."""
    for age_s in EQUAL_AGES_S:
        # One that was older as the watch began was not seen at that age.
        old = [
            life.at(age_s, EQUAL_WINDOW_S) for life in lives if life.role == role and life.lived_s >= age_s
        ]
        seen = [samples for samples in old if samples]
        if len(seen) >= 2:
            return {"role": role, "lives": len(seen), "age_s": age_s, **_compare(seen[0], seen[-1])}
    return None


def _compare(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, Any]:
    memory = [statistics.median(s.memory for s in part) for part in (before, after)]
    files = [statistics.median(s.files for s in part) for part in (before, after)]
    return {
        "memory_mb": [round(m / 1e6, 1) for m in memory],
        "memory_growth": round(memory[1] / memory[0] - 1, 4),
        "files": files,
        "files_growth": files[1] - files[0],
    }

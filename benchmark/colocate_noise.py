"""Was a measurement disturbed?  The rule is stated before anything is measured, and no result enters it.

A cell is disturbed when one of these holds: the hypervisor took more than 2% of the processors' time away during it;
processes that are not the benchmark's used more than 5% (said only where /proc/stat counts the very cores that we may use);
or a fixed piece of work took more than 1.25 times its reference right before or right after it, with everything of the
benchmark held.  The reference is the fastest of five at the beginning.  A disturbed cell is measured again once at the end of
its repetition; what is disturbed then too is shown but enters no verdict and no median.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

STEAL, FOREIGN, SLOWER = 0.02, 0.05, 1.25
# Whether /proc/stat counts the cores that we may use, and no others; asked before anything is pinned.
WHOLE = psutil.cpu_count() == len(os.sched_getaffinity(0))
RULE = (
    f"disturbed: more than {STEAL:.0%} of the processors' time stolen, more than {FOREIGN:.0%} used by other processes, or "
    f"a fixed piece of work more than {SLOWER:g} times slower right before or after than at best at the beginning; measured "
    "again once, then left out"
)


def piece_ms() -> float:
    """Milliseconds of a fixed piece of work, median of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        total = 0
        for n in range(200_000):
            total += n & 7
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def reference_ms() -> float:
    return min(piece_ms() for _ in range(5))


def ticks(stat: str) -> tuple[float, float, float]:
    """(all, used, stolen) ticks from the first line of /proc/stat."""
    user, nice, system, idle, iowait, irq, soft, steal = (float(v) for v in stat.split()[1:9])
    used = user + nice + system + irq + soft
    return used + idle + iowait + steal, used, steal


def why(found: dict[str, float | None], reference: float) -> str | None:
    """What disturbed a cell, by the rule above; None: nothing."""
    if (found["stolen"] or 0.0) > STEAL:
        return f"{found['stolen']:.1%} of the processors' time was stolen"
    if (found["foreign"] or 0.0) > FOREIGN:
        return f"other processes used {found['foreign']:.1%}"
    for name in ("before_ms", "after_ms"):
        value = found[name]
        if value is not None and value > SLOWER * reference:
            return f"a piece of work took {value:.1f} ms {name[:-3]} it, {reference:.1f} at best"
    return None


class Watch:
    """Around one cell: ``begin`` and ``end`` are called with everything held, ``end`` says what it saw."""

    def __init__(self, reference: float) -> None:
        self.reference = reference

    def begin(self) -> None:
        self._before_ms = piece_ms()
        self._ticks, self._own = self._look()

    def end(self) -> dict[str, Any]:
        (all_0, used_0, steal_0), own_0 = self._ticks, self._own
        (all_1, used_1, steal_1), own_1 = self._look()
        passed = max(all_1 - all_0, 1.0)
        hz = os.sysconf("SC_CLK_TCK")
        foreign = max(0.0, (used_1 - used_0) - (own_1 - own_0) * hz) / passed if WHOLE else None
        found: dict[str, float | None] = {
            "stolen": round((steal_1 - steal_0) / passed, 4),
            "foreign": None if foreign is None else round(foreign, 4),
            "before_ms": round(self._before_ms, 2),
            "after_ms": round(piece_ms(), 2),
        }
        return {**found, "why": why(found, self.reference)}

    def _look(self) -> tuple[tuple[float, float, float], float]:
        own = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += times.user + times.system
        return ticks(Path("/proc/stat").read_text().split("\n", 1)[0]), own

"""Was a measurement disturbed?  The rule is stated before anything is measured, and no result
enters it.

A cell is disturbed when one of these holds: the hypervisor took more than 2% of the processors'
time away during it; processes that are not the benchmark's used more than 5% (said only where
/proc/stat counts the very cores that we may use); or a fixed piece of work took more than 1.25
times its reference right before or right after it, with everything of the benchmark held.  The
reference is what it took in the middle while the rates were calibrated, before and after each
measurement there: the machine as it usually is.  (The fastest at the beginning would be a fast
minute's: a run had 48 disturbed cells in its first repetition, on a machine that is 1.3 times
faster now and then, *seen*.)  A disturbed cell is measured again once at the end of its repetition;
what is disturbed then too is shown but enters no verdict and no median.

There are two pieces of work: one thread that counts, and what a decode step does, threads that wait
for each other while they read 64 MiB of weights.  The first alone does not see whatever the threads
share: a cell in which serving and training ran at half their speed for 25 s, with nothing stolen,
had passed (*seen*).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

STEAL, FOREIGN, SLOWER = 0.02, 0.05, 1.25
# Whether /proc/stat counts the cores that we may use, and no others; asked before anything is
# pinned.
WHOLE = psutil.cpu_count() == len(os.sched_getaffinity(0))
RULE = (
    f"disturbed: more than {STEAL:.0%} of the processors' time stolen, more than {FOREIGN:.0%} used by other processes, or "
    f"a fixed piece of work (one thread that counts, threads that read weights) more than {SLOWER:g} times slower right "
    "before or after than in the middle of the calibration; measured again once, then left out"
)
WEIGHTS, WIDTH, HEIGHT = 16, 1024, 2048  # bf16: 64 MiB, more than a cache holds
THREADS = 2


class Pieces:
    """The fixed pieces of work."""

    def __init__(self) -> None:
        self._weights = [torch.ones(HEIGHT, WIDTH, dtype=torch.bfloat16) for _ in range(WEIGHTS)]
        self._row = torch.ones(1, WIDTH, dtype=torch.bfloat16)

    def _count(self) -> None:
        total = 0
        for n in range(200_000):
            total += n & 7

    def _read(self) -> None:
        for weight in self._weights:
            torch.nn.functional.linear(self._row, weight)

    def ms(self) -> dict[str, float]:
        """Milliseconds of each piece, medians of five and of fifteen."""
        threads = torch.get_num_threads()
        torch.set_num_threads(min(THREADS, len(os.sched_getaffinity(0))))
        try:
            self._read()  # its threads wake up
            return {"count": _median_ms(self._count, 5), "read": _median_ms(self._read, 15)}
        finally:
            torch.set_num_threads(threads)


def _median_ms(work: Callable[[], None], count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def ticks(stat: str) -> tuple[float, float, float]:
    """(all, used, stolen) ticks from the first line of /proc/stat."""
    user, nice, system, idle, iowait, irq, soft, steal = (float(v) for v in stat.split()[1:9])
    used = user + nice + system + irq + soft
    return used + idle + iowait + steal, used, steal


def why(found: dict[str, float | None], reference: dict[str, float]) -> str | None:
    """What disturbed a cell, by the rule above; None: nothing.

    Args:
        found: ``stolen``, ``foreign``, and ``before_``, ``after_`` each piece of work.
        reference: milliseconds by piece; without any, no piece of work is looked at.
    """
    if (found["stolen"] or 0.0) > STEAL:
        return f"{found['stolen']:.1%} of the processors' time was stolen"
    if (found["foreign"] or 0.0) > FOREIGN:
        return f"other processes used {found['foreign']:.1%}"
    for name, usual in reference.items():
        for when in ("before", "after"):
            value = found[f"{when}_{name}"]
            if value is not None and value > SLOWER * usual:
                return f"a piece of work ({name}) took {value:.1f} ms {when} it, {usual:.1f} in the middle"
    return None


class Watch:
    """Around one cell: ``begin`` and ``end`` are called with everything held, ``end`` says what it
    saw.

    Args:
        pieces: the work.
        reference: milliseconds by piece; None: none until ``calibrated``.
    """

    def __init__(self, pieces: Pieces, reference: dict[str, float] | None = None) -> None:
        self.pieces, self.reference = pieces, reference or {}
        self._seen: list[dict[str, float]] = []

    def calibrated(self) -> dict[str, float]:
        """The reference from now on: of each piece, the median of what was seen so far (now, where
        nothing was)."""
        if not self._seen:
            self._pieces_ms()
        self.reference = {
            name: round(statistics.median(each[name] for each in self._seen), 2) for name in self._seen[0]
        }
        return self.reference

    def begin(self) -> None:
        self._before_ms = self._pieces_ms()
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
            **{f"before_{name}": round(ms, 2) for name, ms in self._before_ms.items()},
            **{f"after_{name}": round(ms, 2) for name, ms in self._pieces_ms().items()},
        }
        return {**found, "why": why(found, self.reference)}

    def _pieces_ms(self) -> dict[str, float]:
        self._seen.append(self.pieces.ms())
        return self._seen[-1]

    def _look(self) -> tuple[tuple[float, float, float], float]:
        own = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += times.user + times.system
        return ticks(Path("/proc/stat").read_text().split("\n", 1)[0]), own

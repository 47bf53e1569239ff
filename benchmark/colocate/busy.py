"""A plugin of the serve-only baseline: how long plain SGLang's scheduler had something to compute.

Each turn of the scheduler's loop ends in ``process_batch_result`` or in ``on_idle``; the time since
the end of the turn before goes to the busy ones where a batch was processed.  Plain SGLang does not
say this anywhere.  Two clock readings a turn, and at most 20 short lines a second in the file that
``BENCH_BUSY_FILE`` names: ``monotonic seconds, busy seconds``. Nothing but the standard library is
imported before the hooks are registered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATH_ENV = "BENCH_BUSY_FILE"
PERIOD_S = 0.05
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."


class Meter:
    """Adds up turns; lives in the scheduler's process."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the process lives
        self._turn_s = time.monotonic()
        self._busy_s = self._written_s = 0.0

    def end_turn(self, *, busy: bool) -> None:
        now_s = time.monotonic()
        if busy:
            self._busy_s += now_s - self._turn_s
        self._turn_s = now_s
        if now_s - self._written_s >= PERIOD_S:
            self._written_s = now_s
            self._file.write(b"%.6f %.6f\n" % (now_s, self._busy_s))


def activate() -> None:
    """SGLang's plugin entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    meters: list[Meter] = []

    def meter() -> Meter:
        if not meters:  # in the one process that has a scheduler
            meters.append(Meter(os.environ[PATH_ENV]))
        return meters[0]

    def after_batch(result: Any, *args: Any, **kwargs: Any) -> None:
        meter().end_turn(busy=True)

    def after_idle(result: Any, *args: Any, **kwargs: Any) -> None:
        meter().end_turn(busy=False)

    HookRegistry.register(SCHEDULER + "process_batch_result", after_batch, HookType.AFTER)
    HookRegistry.register(SCHEDULER + "on_idle", after_idle, HookType.AFTER)


def read(path: Path) -> list[tuple[float, float]]:
    """(monotonic seconds, busy seconds so far), as written until now."""
    lines = path.read_text().splitlines() if path.exists() else []
    points = [line.split() for line in lines]
    return [(float(p[0]), float(p[1])) for p in points if len(p) == 2]


def at(points: Sequence[tuple[float, float]], when: float) -> float:
    """The value at ``when`` of a line through points in the order of their time, flat beyond both
    ends."""
    before = points[0]
    for point in points:
        if point[0] >= when:
            span = point[0] - before[0]
            share = (when - before[0]) / span if span > 0 else 0.0
            return before[1] + max(0.0, share) * (point[1] - before[1])
        before = point
    return points[-1][1]


def between(points: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Growth of a running total from ``begin`` to ``end``, interpolated; 0 without points."""
    return at(points, end) - at(points, begin) if points else 0.0

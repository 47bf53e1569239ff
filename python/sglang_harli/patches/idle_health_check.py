"""Runtime half of ``patches/10-idle-health-check``: a check that meets a batch's end is answered.

Leans on: ``srt.managers.scheduler.Scheduler`` (``on_idle``, ``maybe_send_health_check_signal``,
``return_health_check_ipcs``).
"""

from __future__ import annotations

from typing import Any


def _before_idle(scheduler: Any) -> None:
    while scheduler.return_health_check_ipcs:
        scheduler.maybe_send_health_check_signal()


HOOKS = (("sglang.srt.managers.scheduler.Scheduler.on_idle", _before_idle, "before"),)

"""Threads and bursts of work that leave the cores to serving."""

from __future__ import annotations

import os
import threading
import time

BURST_S = 0.0005  # of work at a time, about
REST = 4.0  # times as long as the burst before it


def lower_priority(niceness: int) -> None:
    """Lower this thread's priority: 10 for work that somebody waits for, 19 for what has time."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


class Pace:
    """Rests after each burst of work.  ``rush``: never, where the server is about to end."""

    def __init__(self, *, rush: bool = False) -> None:
        self._rush = rush
        self._since = time.thread_time()

    def rest(self) -> None:
        """Called between pieces."""
        worked = time.thread_time() - self._since  # waiting for the disk or for a core is no work
        if self._rush or worked < BURST_S:
            return
        time.sleep(worked * REST)
        self._since = time.thread_time()

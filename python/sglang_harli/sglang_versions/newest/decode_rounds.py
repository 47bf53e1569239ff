"""Decode rounds that SGLang puts behind each prefill, on 0.5.23 (``--prefill-decode-interval``).

Leans on SGLang's Scheduler: prefill_decode_interval, _prefill_decode_interval_remaining.  Where the
running batch is small (``--prefill-decode-interval-min-bs``) fewer come, or none.
"""

from __future__ import annotations

from typing import Any


def left(scheduler: Any) -> int:
    """Most that come before the next prefill."""
    return scheduler._prefill_decode_interval_remaining


def between(scheduler: Any) -> int:
    """Most that come between two prefills."""
    return scheduler.prefill_decode_interval

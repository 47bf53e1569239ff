"""Decode rounds that SGLang puts behind each prefill: none on 0.5.16, which prefills first."""

from __future__ import annotations

from typing import Any


def left(scheduler: Any) -> int:
    """Most that come before the next prefill."""
    return 0


def between(scheduler: Any) -> int:
    """Most that come between two prefills."""
    return 0

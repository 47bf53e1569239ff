"""What loads and unloads of LoRA adapters give and take on SGLang 0.5.16, where the first
answers."""

from __future__ import annotations

from typing import Any


def prepare(request: Any) -> None:
    """A load's request as the scheduler takes it: as it came."""


def merged(results: list[Any]) -> Any:
    """One answer of all ranks."""
    return results[0]


def is_partly_loaded(results: list[Any], name: str) -> bool:
    """Whether some rank has what a load, which failed, was to bring."""
    return False

"""Adapters that the scheduler may hold and that have no name, on SGLang 0.5.16."""

from __future__ import annotations

from typing import Any


def unfinished(manager: Any) -> dict[str, str]:
    """Name -> id of those whose unload has failed: the name is loaded again when the unload has
    been done.  SGLang keeps no such record here, so it is ours."""
    return manager.__dict__.setdefault("harli_unfinished_unloads", {})

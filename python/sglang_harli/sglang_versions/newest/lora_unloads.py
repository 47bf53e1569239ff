"""Adapters that the scheduler may hold and that have no name, on SGLang 0.5.23."""

from __future__ import annotations

from typing import Any


def unfinished(manager: Any) -> dict[str, str]:
    """Name -> id of those whose unload has failed, in SGLang's own record: the name is loaded again
    when the unload has been done."""
    return manager.pending_lora_unloads

"""What ``Engine._launch_subprocesses`` gives on SGLang 0.5.23."""

from __future__ import annotations

from typing import Any


def parts(launched: tuple[Any, ...]) -> tuple[Any, Any]:
    """(the schedulers' result, the watchdog of the processes or None)."""
    _tokenizer, _templates, _ports, schedulers, watchdog, _weight_cache = launched
    return schedulers, watchdog

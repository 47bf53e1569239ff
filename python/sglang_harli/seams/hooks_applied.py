"""Whether the installed SGLang lets everything be replaced that is: all rows at once, in a process
that serves nothing and ends then.

Leans on SGLang's ``plugins.hook_registry``.
"""

from __future__ import annotations

import importlib
import logging

from sglang_harli import plugin


class _Kept(logging.Handler):
    """SGLang only logs a hook that it cannot apply: the reasons, by message."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.reasons: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.reasons[record.getMessage()] = (
            f"{type(error).__name__}: {error}" if error else "see SGLang's log"
        )


def apply_all() -> tuple[int, dict[str, str]]:
    """How many targets there are, and why some could not be replaced, by target.  Changes this
    process's SGLang for good."""
    from sglang.srt.plugins import hook_registry

    from sglang_harli.patches import catalog

    registry = hook_registry.HookRegistry
    rows = (plugin.SERVER_ARGS, *plugin.TABLE)
    refused: dict[str, str] = {}
    for row in rows:
        module, name = row.hook.split(":")
        try:
            hook = getattr(importlib.import_module(module), name)
            registry.register(row.target, hook, hook_registry.HookType(row.kind))
        except Exception as error:  # boundary: one row that breaks is named; the others are tried
            refused[row.target] = f"{row.hook}: {type(error).__name__}: {error}"
    catalog.register_all(registry)
    kept = _Kept()
    hook_registry.logger.addHandler(kept)
    try:
        registry.apply_hooks()
    finally:
        hook_registry.logger.removeHandler(kept)
    targets = {row.target for row in rows} | {hook[0] for hooks in catalog.ALL.values() for hook in hooks}
    for target in sorted(targets - registry._patched - refused.keys()):
        reasons = [why for message, why in kept.reasons.items() if target in message]
        refused[target] = reasons[0] if reasons else "SGLang does not say why"
    return len(targets), refused

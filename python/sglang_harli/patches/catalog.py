"""The patches of the installed SGLang with the hooks of their runtime halves.

Each has a page of the same name in the top-level folder ``patches/``, and an upstream-ready diff in
the folder there of each version that needs it.
No patch module imports SGLang before a hook of it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_harli.patches import (
    control_requests,
    cpu_kv_indices,
    cpu_sampling,
    idle_health_check,
    nan_sampling,
    request_fields,
    session_replace,
    shutdown_drain,
    stop_regex,
)
from sglang_harli.patches.lora import (
    adapter_checks,
    cache_key,
    gate,
    padded_mlp,
    peft_adapters,
    pin_memory,
    request_counts,
    unload,
)
from sglang_harli.sglang_versions import supported

Hook = tuple[str, Callable[..., Any], str]  # what it hooks in SGLang, ours, and a HookType

_ROWS: dict[str, tuple[Hook, ...]] = {
    "01-lora-pin-memory": pin_memory.HOOKS,
    "02-lora-gate": gate.HOOKS,
    "03-lora-padded-mlp": padded_mlp.HOOKS,
    "04-lora-peft-adapters": peft_adapters.HOOKS,
    "05-lora-adapter-checks": adapter_checks.HOOKS,
    "06-request-fields": request_fields.HOOKS,
    "07-lora-request-counts": request_counts.HOOKS,
    "08-lora-unload": unload.HOOKS,
    "09-shutdown-drain": shutdown_drain.HOOKS,
    "10-idle-health-check": supported.only("pinned", idle_health_check.HOOKS),
    "11-lora-cache-key": cache_key.HOOKS,
    "12-nan-sampling": nan_sampling.HOOKS,
    "13-cpu-sampling": cpu_sampling.HOOKS,
    "14-session-replace": session_replace.HOOKS,
    "15-control-requests": control_requests.HOOKS,
    "16-stop-regex": stop_regex.HOOKS,
    "17-cpu-kv-indices": supported.only("newest", cpu_kv_indices.HOOKS),
}
ALL = {name: hooks for name, hooks in _ROWS.items() if hooks}


def register_all(registry: Any) -> None:
    """Register all hooks with SGLang's ``HookRegistry``, whose ``apply_hooks`` installs them."""
    from sglang.srt.plugins.hook_registry import HookType

    for hooks in ALL.values():
        for target, hook, kind in hooks:
            registry.register(target, hook, HookType(kind))

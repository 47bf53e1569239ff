"""What ours assumes of the installed SGLang, by calling it: small objects on the CPU, no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hooks_reach_other_modules() -> str | None:
    """A replaced name is replaced in the modules that imported it, too."""
    import sys
    import types

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    defines, imports = types.ModuleType("harli_seam_a"), types.ModuleType("harli_seam_b")
    defines.__dict__["double"] = imports.__dict__["double"] = lambda value: 2 * value
    sys.modules |= {module.__name__: module for module in (defines, imports)}
    target = f"{defines.__name__}.double"
    try:
        HookRegistry.register(target, lambda original, value: original(value) + 1, HookType.AROUND)
        HookRegistry.apply_hooks()
        found = defines.double(3), imports.double(3)  # type: ignore[attr-defined]
    finally:
        HookRegistry._hooks.pop(target, None)
        HookRegistry._patched.discard(target)
        for module in (defines, imports):
            del sys.modules[module.__name__]
    return (
        None if found == (7, 7) else f"around a function that doubles 3 and adds 1: {found}, expected (7, 7)"
    )


def slots_come_back(page_size: int) -> str | None:
    """What is freed is available at once, also in a free group, and all is after ``clear``."""
    import torch
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

    size = 16 * page_size
    kind: Any = TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator
    paged = {} if page_size == 1 else {"page_size": page_size}
    slots = kind(size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=True, **paged)
    taken = slots.alloc(4 * page_size)
    counts = [slots.available_size()]
    slots.free(taken[: 2 * page_size])
    counts.append(slots.available_size())
    slots.free_group_begin()
    slots.free(taken[2 * page_size :])
    slots.free_group_end()
    counts.append(slots.available_size())
    slots.alloc(size)
    slots.clear()
    counts.append(slots.available_size())
    expected = [12 * page_size, 14 * page_size, size, size]
    return None if counts == expected else f"available slots were {counts}, expected {expected}"


def arguments_take_fields() -> str | None:
    """With the plugin on, SGLang's parser has our options, and its own as they were."""
    import argparse

    from sglang.srt import server_args
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_harli import plugin
    from sglang_harli.sglang_versions import supported

    def options() -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        server_args.ServerArgs.add_cli_args(parser)
        return {a.dest: (a.default, a.choices, a.help, a.nargs) for a in parser._actions}

    plain = options()
    # The plugin stays out of the way of a version that is not supported: here it is to be tried.
    known, supported.SUPPORTED = (
        supported.SUPPORTED,
        (*supported.SUPPORTED, supported.public(supported.installed())),
    )
    try:
        plugin.activate()
    finally:
        supported.SUPPORTED = known
    HookRegistry.apply_hooks()
    ours = options()
    other = sorted(name for name, value in plain.items() if ours.get(name) != value)
    if other:
        return f"options differ from SGLang's own: {', '.join(other)}"
    return None if "harli_finetune" in ours else "our options are no flags"


CALLS: dict[str, Callable[[], str | None]] = {
    "hooks reach modules that imported the name": hooks_reach_other_modules,
    "freed slots are available (page size 1)": lambda: slots_come_back(1),
    "freed slots are available (page size 4)": lambda: slots_come_back(4),
    "ServerArgs takes our options": arguments_take_fields,
}

"""The installed SGLang's own files: ``from sglang_harli.sglang_versions.current import arguments``
is ``newest.arguments`` or ``pinned.arguments``, imported when it is asked for."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_harli.sglang_versions.newest import arguments as arguments
    from sglang_harli.sglang_versions.newest import chat_fields as chat_fields
    from sglang_harli.sglang_versions.newest import decode_rounds as decode_rounds
    from sglang_harli.sglang_versions.newest import endpoints as endpoints
    from sglang_harli.sglang_versions.newest import kv_pool as kv_pool
    from sglang_harli.sglang_versions.newest import launch as launch
    from sglang_harli.sglang_versions.newest import lora_gate as lora_gate
    from sglang_harli.sglang_versions.newest import lora_requests as lora_requests
    from sglang_harli.sglang_versions.newest import lora_unloads as lora_unloads
    from sglang_harli.sglang_versions.newest import lora_updates as lora_updates
    from sglang_harli.sglang_versions.newest import prefix_tree as prefix_tree
    from sglang_harli.sglang_versions.newest import refusals as refusals
    from sglang_harli.sglang_versions.newest import requests as requests
    from sglang_harli.sglang_versions.newest import slots as slots
    from sglang_harli.sglang_versions.newest import stop_regex as stop_regex
    from sglang_harli.sglang_versions.newest import weight_updates as weight_updates
else:

    def __getattr__(name: str) -> ModuleType:
        from sglang_harli.sglang_versions import supported

        module = f"{__package__}.{supported.folder()}.{name}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"{__name__} has no {name}")
        found = globals()[name] = importlib.import_module(module)
        return found

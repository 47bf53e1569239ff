"""What SGLang 0.5.16 says of the KV pool that it is about to build (``KVCacheConfigurator``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (what, whether this configurator's server has it): kinds of pool that only this version has.
OTHER_KINDS: tuple[tuple[str, Callable[[Any], bool]], ...] = ()


def dtype_name(configurator: Any) -> str | None:
    """The KV cache's dtype as an option spells it, with what the checkpoint asks for."""
    return configurator.server_args.kv_cache_dtype

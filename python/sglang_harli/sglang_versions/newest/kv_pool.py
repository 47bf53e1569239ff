"""What SGLang 0.5.23 says of the KV pool that it is about to build (``KVCacheConfigurator``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_harli.sglang_versions.newest import arguments

# (what, whether this configurator's server has it): kinds of pool that only this version has.
OTHER_KINDS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("--enable-kv-cache-sharding", lambda c: c.kv_shard_rank is not None),
    # Its requests begin in the host's memory, and their slots on the device are taken elsewhere.
    (
        "--disaggregation-decode-host-receive-threshold",
        lambda c: arguments.in_force(c.server_args).disaggregation_decode_host_receive_threshold < 1,
    ),
    # It reads and writes the buffers by address, also while training has their memory.
    (
        "--enable-unified-cache-external-linker",
        lambda c: arguments.in_force(c.server_args).enable_unified_cache_external_linker,
    ),
)


def dtype_name(configurator: Any) -> str | None:
    """The KV cache's dtype as an option spells it, with what the checkpoint asks for."""
    return configurator.kv_cache_dtype_str

"""Memory of a decode server that a prefill server writes to, on no stream of this device.

Hooks on SGLang's ``disaggregation.decode``: DecodePreallocQueue._pre_alloc and
DecodeTransferQueue.pop_transferred. Leans besides on their token_to_kv_pool_allocator,
scheduler.token_to_kv_pool_allocator and queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_harli.managers.scheduler.memory.registered_memory import IN_PLACE
from sglang_harli.mem_cache.kv.slot_allocator import StripedFreeList

logger = logging.getLogger(__name__)

# How long a sender may write on after a transfer was given up: SGLang 0.5.23 keeps such slots for
# as long (SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT); 0.5.16 frees them at once.
STRAY_WRITES_S = 30.0


def pre_alloc(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DecodePreallocQueue._pre_alloc``: what training gave back is cleared before the
    prefill server hears of the slots. Forwards come behind the clearing by the stream's order; a
    transfer does not, and would be cleared away. The host waits only if that is not over."""
    taken = original(queue, *args, **kwargs)
    allocator = queue.token_to_kv_pool_allocator
    if isinstance(allocator, StripedFreeList):
        allocator.pool.backing.settle()
    return taken


def pop_transferred(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DecodeTransferQueue.pop_transferred``: where a transfer was given up, slots that are
    free again may still be written to: training takes none for a while, where those would be its
    own bytes."""
    before = len(queue.queue)
    arrived = original(queue, *args, **kwargs)
    given_up = before - len(queue.queue) - len(arrived)
    allocator = queue.scheduler.token_to_kv_pool_allocator
    if given_up > 0 and isinstance(allocator, StripedFreeList):
        pool = allocator.pool
        if pool.backing.name in IN_PLACE:
            pool.hold_off(STRAY_WRITES_S)
    return arrived

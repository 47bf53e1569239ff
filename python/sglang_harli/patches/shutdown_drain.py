"""Runtime half of ``patches/09-shutdown-drain``: after SIGTERM a server does not wait for ever.

Leans on: ``srt.managers.tokenizer_manager.TokenizerManager`` (``sigterm_watchdog``,
``_init_req_state``, ``_handle_batch_output``, ``_handle_abort_req``; ``gracefully_exit``,
``rid_to_state``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
QUIET_S = 60.0  # without a token of any request that is waited for
LOOK_S = 1.0


class Drain:
    """The requests that an ending server waits for, until ``over``; ``heard_s``: their last token
    or end, or the wait's beginning (``time.monotonic``)."""

    def __init__(self, rids: set[str], now_s: float) -> None:
        self._rids = rids
        self.heard_s = now_s
        self.over = False

    def heard(self, rids: list[str], now_s: float) -> None:
        if not self._rids.isdisjoint(rids):
            self.heard_s = now_s

    def left(self, rids: set[str]) -> int:
        return len(self._rids & rids)


def _before_req_state(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    drain = manager.__dict__.get("shutdown_drain")
    if drain is None or not drain.over:
        return
    text = "the server is ending"
    if getattr(obj, "stream", False):
        raise ValueError(text)  # which SGLang writes into the stream
    raise HTTPException(status_code=HTTPStatus.SERVICE_UNAVAILABLE, detail=text)


def _before_batch_output(manager: Any, recv_obj: Any) -> None:
    drain = manager.__dict__.get("shutdown_drain")
    if drain is not None:
        drain.heard(recv_obj.rids, time.monotonic())


def _before_abort(manager: Any, recv_obj: Any) -> None:
    drain = manager.__dict__.get("shutdown_drain")
    if drain is not None:
        drain.heard([recv_obj.rid], time.monotonic())


async def _sigterm_watchdog(original: Callable[..., Awaitable[None]], manager: Any) -> None:
    """Around SGLang's wait, which ends when no request has a state any more."""
    limit = asyncio.get_running_loop().create_task(_limit(manager))
    try:
        await original(manager)
    finally:
        limit.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await limit


async def _limit(manager: Any) -> None:
    while not manager.gracefully_exit:
        await asyncio.sleep(LOOK_S)
    drain = manager.shutdown_drain = Drain(set(manager.rid_to_state), time.monotonic())
    while left := drain.left(set(manager.rid_to_state)):
        if time.monotonic() - drain.heard_s > QUIET_S:
            logger.error(
                "the server ends without %d requests: none of them has got a token for %g s", left, QUIET_S
            )
            break
        await asyncio.sleep(LOOK_S)
    late = len(manager.rid_to_state) - left
    if late > 0:
        logger.warning("the server ends without %d requests that came after SIGTERM", late)
    drain.over = True
    manager.rid_to_state.clear()


HOOKS = (
    (f"{_MANAGER}.sigterm_watchdog", _sigterm_watchdog, "around"),
    (f"{_MANAGER}._init_req_state", _before_req_state, "before"),
    (f"{_MANAGER}._handle_batch_output", _before_batch_output, "before"),
    (f"{_MANAGER}._handle_abort_req", _before_abort, "before"),
)

"""HTTP process: calls to the scheduler over the channel of SGLang's dumper, its only generic one.
Leans on TokenizerManager.dumper_control and io_struct.DumperControlReqInput."""

from __future__ import annotations

import asyncio
from typing import Any

_calls: set[asyncio.Future[Any]] = set()  # the event loop keeps none


async def call(manager: Any, method: str, body: dict[str, Any]) -> list[Any]:
    """The answers of the scheduler's ranks (DumperControlReqOutput).  Runs to its end also where
    the caller is cancelled: SGLang would give the late answer to the next caller."""
    from sglang.srt.managers.io_struct import DumperControlReqInput

    answers = asyncio.ensure_future(manager.dumper_control(DumperControlReqInput(method=method, body=body)))
    _calls.add(answers)
    answers.add_done_callback(_calls.discard)
    return await asyncio.shield(answers)

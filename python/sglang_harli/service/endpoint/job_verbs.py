"""The verbs of the inner endpoint about jobs, besides the public ones
(``protocol/calls/fine_tuning.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from sglang_harli.errors import ProtocolError
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import fine_tuning
from sglang_harli.service.jobs.registry import JobRegistry


class JobVerbs:
    """What the HTTP process asks about jobs; ``readers`` read the store."""

    def __init__(self, registry: JobRegistry, readers: Executor) -> None:
        self._registry = registry
        self._readers = readers
        self._verbs: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "events_before": self._events_before,
        }

    async def do(self, request: public.Request, frames: Sequence[bytes]) -> Any:
        """The result of one request, whose verb is one of ``fine_tuning.VERBS``."""
        if frames:
            raise ProtocolError(f"{request.verb} takes no data, {len(frames)} frames came behind the header")
        return await self._verbs[request.verb](request.args)

    async def _events_before(self, raw: dict[str, Any]) -> fine_tuning.EventsPage:
        args = public.convert_args(raw, fine_tuning.EventsBeforeArgs)
        self._registry.get(args.job)
        events = await asyncio.get_running_loop().run_in_executor(
            self._readers, self._registry.store.events_before, args.job, args.before, args.limit + 1
        )
        return fine_tuning.EventsPage(events=events[: args.limit], has_more=len(events) > args.limit)

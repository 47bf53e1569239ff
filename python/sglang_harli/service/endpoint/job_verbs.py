"""The verbs of the inner endpoint about jobs, besides the public ones
(``protocol/calls/fine_tuning.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from sglang_harli.errors import SHOWN, NotFoundError, ProtocolError
from sglang_harli.failpoints import Failpoint, failpoint
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import fine_tuning
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.publish.adapter_names import AdapterNames


class JobVerbs:
    """What the HTTP process asks about jobs; ``readers`` read the store."""

    def __init__(self, registry: JobRegistry, names: AdapterNames, readers: Executor) -> None:
        self._registry = registry
        self._names = names
        self._readers = readers
        self._verbs: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "events_before": self._events_before,
            "model_delete": self._model_delete,
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

    async def _model_delete(self, raw: dict[str, Any]) -> fine_tuning.ModelDeletion:
        """The model is in no list from now on, and never loaded again; durable when answered."""
        name = public.convert_args(raw, fine_tuning.ModelArgs).model
        record = self._names.find(name)
        if record is None:
            raise NotFoundError(f"no job of this server has made the model {name[:SHOWN]!r}", param="model")
        again = name in record.deleted_models
        change = None if again else self._registry.apply(transitions.delete_model(record, name))
        await self._registry.durable(change)
        failpoint(Failpoint.MODEL_DELETED)
        return fine_tuning.ModelDeletion(model=name, again=again)

"""The verbs of the inner endpoint about jobs, besides the public ones
(``protocol/calls/fine_tuning.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from sglang_harli.errors import SHOWN, NotFoundError, NotReadyError, ProtocolError
from sglang_harli.failpoints import FileFailpoint, failpoint
from sglang_harli.names import checkpoint_name
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import fine_tuning
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.publish import checkpoint_list
from sglang_harli.service.publish.adapter_names import Adapter, AdapterNames, is_deleted

STORED_S = 2.0


class JobVerbs:
    """What the HTTP process asks about jobs; ``readers`` read the store."""

    def __init__(self, registry: JobRegistry, names: AdapterNames, readers: Executor) -> None:
        self._registry = registry
        self._names = names
        self._readers = readers
        self._verbs: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "events_before": self._events_before,
            "model_delete": self._model_delete,
            "checkpoints": self._checkpoints,
        }

    async def do(self, request: public.Request, frames: Sequence[bytes]) -> Any:
        """The result of one request, whose verb is one of ``fine_tuning.VERBS``."""
        if frames:
            raise ProtocolError(f"{request.verb} takes no data, {len(frames)} frames came behind the header")
        return await self._verbs[request.verb](request.args)

    async def _events_before(self, raw: dict[str, Any]) -> fine_tuning.EventsPage:
        args = public.convert_args(raw, fine_tuning.EventsBeforeArgs)
        self._registry.get(args.job)
        store = self._registry.store
        events = await self._read(store.events_before, args.job, args.before, args.limit + 1)
        return fine_tuning.EventsPage(events=events[: args.limit], has_more=len(events) > args.limit)

    async def _checkpoints(self, raw: dict[str, Any]) -> fine_tuning.CheckpointsPage:
        args = public.convert_args(raw, fine_tuning.CheckpointsArgs)
        self._registry.get(args.job)
        # One that was saved just now is shown when the store knows it; reading waits no longer.
        await asyncio.wait({self._registry.journal.put()}, timeout=STORED_S)
        record = self._registry.get(args.job)
        paths = JobPaths(self._registry.run_dir, record.id)
        found, has_more = await self._read(checkpoint_list.page, record, paths, args.before, args.limit)
        return fine_tuning.CheckpointsPage(checkpoints=found, has_more=has_more)

    async def _model_delete(self, raw: dict[str, Any]) -> fine_tuning.ModelDeletion:
        """The model is in no list from now on, and never loaded again; durable when answered."""
        name = public.convert_args(raw, fine_tuning.ModelArgs).model
        if self._names.is_coming(name):  # it may answer already, and would be deleted for a while only
            raise NotReadyError(f"{name[:SHOWN]} is being published: try again in a moment", code=public.BUSY)
        adapter = self._names.find(name)
        again = adapter is not None and is_deleted(self._registry.get(adapter.job), adapter.step)
        if adapter is None or not (again or await self._is_there(adapter)):
            raise NotFoundError(f"no job of this server has made the model {name[:SHOWN]!r}", param="model")
        record = self._registry.get(adapter.job)
        change = None if again else self._registry.apply(transitions.delete_model(record, name))
        await self._registry.durable(change)
        failpoint(FileFailpoint.MODEL_DELETED)
        also = [checkpoint_name(name, record.model_step)] if adapter.step is None else []
        return fine_tuning.ModelDeletion(model=name, again=again, also=also)

    async def _is_there(self, adapter: Adapter) -> bool:
        if adapter.step is None:
            return True
        paths = JobPaths(self._registry.run_dir, adapter.job)
        steps = await self._read(checkpoint_list.there, self._registry.get(adapter.job), paths)
        return adapter.step in steps

    async def _read(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, call, *args)

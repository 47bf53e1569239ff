"""Runtime half of ``patches/08-lora-unload``: unloads wait for requests that make progress.

Leans on: ``srt.managers.tokenizer_control_mixin.TokenizerControlMixin`` (``load_lora_adapter``,
``load_lora_adapter_from_tensors``, ``unload_lora_adapter``, ``update_lora_adapter_communicator``),
``TokenizerManager`` (``lora_update_lock``, ``lora_registry``, ``lora_ref_cache``, ``server_args``),
``srt.lora.lora_registry`` (``LoRARef``, ``LoRARegistry.register``, ``unregister``, ``_registry``,
``_counters``, ``_registry_lock``) and the requests of ``srt.managers.io_struct``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from sglang_harli.patches.lora.request_counts import uses_of
from sglang_harli.sglang_versions import current

logger = logging.getLogger(__name__)

_MIXIN = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
QUIET_S = 60.0  # without a token of any request that is waited for
LOOK_S = 0.1


class AdapterUpdates:
    """The unloads and evictions in progress of one tokenizer manager.  ``leaving``: names that are
    being unloaded; ``tasks``: loads, unloads and evictions in progress."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.leaving: set[str] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self._evicting = False
        self._said = False
        uses_of(manager).idle = self._adapter_is_idle

    def _adapter_is_idle(self) -> None:
        if self._excess() > 0:
            self.start(self.evict())

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # ---------------------------------------------------------------- eviction
    def _excess(self) -> int:
        most = current.arguments.in_force(self._manager.server_args).max_loaded_loras
        return 0 if most is None else self._manager.lora_registry.num_registered_loras - most

    def _evictable(self) -> str | None:
        """The least recently used adapter that is neither pinned nor in use."""
        uses = uses_of(self._manager)
        for name, ref in self._manager.lora_registry.get_all_adapters().items():
            if not ref.pinned and not uses.in_use(name, ref.lora_id):
                return name
        return None

    async def evict(self, result: Any = None) -> None:
        """Unload what is beyond --max-loaded-loras and not in use; the rest when its requests end.
        A load's ``result`` gets the list of adapters that are loaded afterwards."""
        if self._evicting:
            return
        self._evicting = True
        try:
            while self._excess() > 0:
                async with self._manager.lora_update_lock:
                    name = self._evictable() if self._excess() > 0 else None
                    if name is None or not await self._evict_one(name):
                        self._say_excess()
                        return
                if result is not None and result.loaded_adapters:
                    result.loaded_adapters.pop(name, None)
            self._said = False
        finally:
            self._evicting = False

    def _say_excess(self) -> None:
        if self._excess() > 0 and not self._said:
            self._said = True
            logger.info(
                "%d LoRA adapters are loaded, more than --max-loaded-loras %d: all are in use or pinned, and the "
                "least recently used goes when its requests have ended",
                self._manager.lora_registry.num_registered_loras,
                current.arguments.in_force(self._manager.server_args).max_loaded_loras,
            )

    async def _evict_one(self, name: str) -> bool:
        most = current.arguments.in_force(self._manager.server_args).max_loaded_loras
        logger.info("unloading the least recently used LoRA adapter %s (--max-loaded-loras %d)", name, most)
        ref = await self.take_away(name)
        if uses_of(self._manager).in_use(name, ref.lora_id):  # a request came meanwhile
            await self.put_back(ref)
            return True
        result = await self.unload_now(ref)
        if not result.success:
            logger.error("LoRA adapter %s could not be unloaded: %s", name, result.error_message)
        return bool(result.success)

    # ---------------------------------------------------------------- the registry
    async def take_away(self, name: str) -> Any:
        """Hide the adapter from new requests; running ones go on.  ValueError: it is not loaded."""
        ref = self._manager.lora_registry.get_all_adapters().get(name)
        await self._manager.lora_registry.unregister(name)
        return ref

    async def put_back(self, ref: Any) -> None:
        registry = self._manager.lora_registry
        async with registry._registry_lock.writer_lock:
            registry._registry[ref.lora_name] = ref  # with the counter that it has

    async def unload_now(self, ref: Any) -> Any:
        """Have the scheduler unload an adapter that was taken away; where no rank has, the name is
        back."""
        results, result = await self._ask_to_unload(ref.lora_name, ref.lora_id)
        if result.success:
            self._manager.lora_registry._counters.pop(ref.lora_id, None)
        elif any(one.success for one in results):
            self.unfinished[ref.lora_name] = ref.lora_id
        else:
            await self.put_back(ref)
        return result

    @property
    def unfinished(self) -> dict[str, str]:
        """Name -> id of adapters that some rank may hold and that have no name."""
        return current.lora_unloads.unfinished(self._manager)

    async def finish(self, name: str) -> Any:
        """Have the scheduler unload one of ``unfinished``, which no request uses."""
        _, result = await self._ask_to_unload(name, self.unfinished[name])
        if result.success:
            self._manager.lora_registry._counters.pop(self.unfinished.pop(name), None)
        return result

    async def _ask_to_unload(self, name: str, lora_id: str) -> tuple[list[Any], Any]:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        request = UnloadLoRAAdapterReqInput(lora_name=name, lora_id=lora_id)
        results = await self._manager.update_lora_adapter_communicator(request)
        return results, current.lora_updates.merged(results)

    async def quiet(self, ref: Any) -> bool:
        """Wait until no request uses the adapter; False: some do, and none makes progress."""
        uses = uses_of(self._manager)
        since_s = time.monotonic()
        if uses.in_use(ref.lora_name, ref.lora_id):
            logger.info(
                "LoRA adapter %s is unloaded when the %d requests that use it have ended",
                *(ref.lora_name, uses.requests(ref.lora_id)),
            )
        while uses.in_use(ref.lora_name, ref.lora_id):
            if time.monotonic() - max(since_s, uses.heard_s.get(ref.lora_id, 0.0)) > QUIET_S:
                return False
            await asyncio.sleep(LOOK_S)
        return True


def updates_of(manager: Any) -> AdapterUpdates:
    """The updates of a ``TokenizerManager``."""
    found = manager.__dict__.get("lora_updates")
    if found is None:
        found = manager.lora_updates = AdapterUpdates(manager)
    return found


# ------------------------------------------------------------------ in SGLang's tokenizer manager
async def _load_from_path(original: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    return await asyncio.shield(updates_of(manager).start(_load(manager, obj, obj.lora_path)))


async def _load_from_tensors(original: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    return await asyncio.shield(updates_of(manager).start(_load(manager, obj, "__tensor__")))


async def _unload(original: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    return await asyncio.shield(updates_of(manager).start(unload_when_idle(manager, obj.lora_name)))


def _check(manager: Any, name: Any) -> None:
    if not current.arguments.in_force(manager.server_args).enable_lora:
        raise ValueError("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
    if current.arguments.in_force(manager.server_args).dp_size != 1:
        raise ValueError("dp_size must be 1 for dynamic lora loading")
    if not name:
        raise ValueError("lora_name is missing: it names the adapter")
    if name in updates_of(manager).leaving:
        raise ValueError(f"LoRA adapter {name!r} is being unloaded: it goes when its requests have ended")


async def _load(manager: Any, obj: Any, path: str) -> Any:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqOutput

    manager.auto_create_handle_loop()
    updates = updates_of(manager)
    try:
        async with manager.lora_update_lock:
            _check(manager, obj.lora_name)
            if obj.lora_name in updates.unfinished:
                raise ValueError(
                    f"LoRA adapter {obj.lora_name!r} has not been unloaded yet: unload it again first"
                )
            refuse_when_all_are_pinned(manager)
            logger.info("Start load Lora adapter. Lora name=%s, path=%s", obj.lora_name, path)
            ref = LoRARef(lora_name=obj.lora_name, lora_path=path, pinned=obj.pinned)
            obj.lora_id = ref.lora_id
            current.lora_updates.prepare(obj)
            results = await manager.update_lora_adapter_communicator(obj)
            result = current.lora_updates.merged(results)
            if result.success:
                await manager.lora_registry.register(ref)
                manager.lora_ref_cache[obj.lora_name] = ref
            elif (
                obj.lora_name not in manager.lora_registry.get_all_adapters()
                and current.lora_updates.is_partly_loaded(results, obj.lora_name)
            ):
                updates.unfinished[obj.lora_name] = ref.lora_id
                await updates.finish(obj.lora_name)
    except ValueError as error:
        return LoadLoRAAdapterReqOutput(success=False, error_message=str(error))
    with uses_of(manager).looking_up([obj.lora_name]):  # what has just come is not the first to go
        await updates.evict(result)
    return result


def refuse_when_all_are_pinned(manager: Any) -> None:
    """Raises ValueError where no place under --max-loaded-loras can become free."""
    most = current.arguments.in_force(manager.server_args).max_loaded_loras
    pinned = sum(bool(ref.pinned) for ref in manager.lora_registry.get_all_adapters().values())
    if most is not None and pinned >= most:
        raise ValueError(
            f"all --max-loaded-loras {most} places are taken by pinned adapters: unload one or raise it"
        )


async def unload_when_idle(manager: Any, name: str) -> Any:
    """Unload an adapter when no request uses it any more, or say why it is still loaded."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput

    manager.auto_create_handle_loop()
    updates = updates_of(manager)
    try:
        async with manager.lora_update_lock:
            _check(manager, name)
            logger.info("Start unload Lora adapter. Lora name=%s", name)
            if name in updates.unfinished:
                return await updates.finish(name)
            ref = await updates.take_away(name)
            updates.leaving.add(name)
    except ValueError as error:
        return UnloadLoRAAdapterReqOutput(success=False, error_message=str(error))
    try:
        quiet = await updates.quiet(ref)
        async with manager.lora_update_lock:
            if quiet:
                return await updates.unload_now(ref)
            await updates.put_back(ref)
    finally:
        updates.leaving.discard(name)
    text = (
        f"LoRA adapter {name!r} is still loaded: {uses_of(manager).requests(ref.lora_id)} requests use it, and none of them has got a token for "
        f"{QUIET_S:g} s. End them (/abort_request), then unload it again"
    )
    logger.error("%s", text)
    return UnloadLoRAAdapterReqOutput(success=False, error_message=text)


HOOKS = (
    (f"{_MIXIN}.load_lora_adapter", _load_from_path, "around"),
    (f"{_MIXIN}.load_lora_adapter_from_tensors", _load_from_tensors, "around"),
    (f"{_MIXIN}.unload_lora_adapter", _unload, "around"),
)

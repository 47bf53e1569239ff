"""HTTP process: what SGLang serves, for the routes of OpenAI's API.

Leans on SGLang's TokenizerManager (served_model_name, model_path, lora_registry,
unload_lora_adapter, which is ``publisher.unload_lora_adapter`` and patches/08-lora-unload) and
UnloadLoRAAdapterReqInput.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.patches.lora.unload import updates_of


class TokenizerModels:
    """The base and the adapters of a TokenizerManager (``openai.endpoint.ServedModels``)."""

    def __init__(self, manager: Any, publisher: AdapterPublisher) -> None:
        self._manager = manager
        self._publisher = publisher

    def is_base(self, name: str) -> bool:
        """Whether the base answers to this name."""
        return name in (self._manager.served_model_name, self._manager.model_path)

    def is_loaded(self, name: str) -> bool:
        """Whether an adapter of this name is loaded."""
        return name in self._manager.lora_registry.get_all_adapters()

    async def unload(self, name: str, *, deleted: bool) -> str:
        """Unload the adapter as ``/unload_lora_adapter`` does, where it is loaded; what is wrong,
        or ``""``.  Goes on where the caller leaves.  ``deleted``: it never comes back."""
        return await asyncio.shield(updates_of(self._manager).start(self._unload(name, deleted)))

    async def _unload(self, name: str, deleted: bool) -> str:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        if deleted:
            self._publisher.delete(name)  # first: what is being loaded now is put away again
        if not self.is_loaded(name):
            return ""
        result = await self._manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        return "" if result.success else str(result.error_message)

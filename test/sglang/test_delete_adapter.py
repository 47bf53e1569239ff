"""A model is deleted, or an operator's adapter unloaded, on SGLang's own registry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, LoadLoRAAdapterReqInput

from sglang_harli.managers.http.served_models import TokenizerModels
from sglang_harli.patches.lora import unload
from sglang_harli.patches.lora.request_counts import uses_of
from sglang_harli.patches.lora.unload import updates_of
from sglang_harli.protocol import internal
from support.publication import Service, connected, hook_publisher, publish, run, state, until

NAME, OTHER = "base-ft-first-00000001", "base-ft-second-00000002"


@pytest.fixture(autouse=True)
def hooks(sglang_patches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_publisher(monkeypatch)


def models(service: Service) -> TokenizerModels:
    return TokenizerModels(service.manager, service.publisher)


async def ask(service: Service, name: str) -> Any:
    return await service.manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=name))


@run
async def test_a_deleted_model_finishes_its_requests_and_answers_no_more(folder: Path) -> None:
    async with connected(folder) as service:
        manager, served = service.manager, models(service)
        await service.publish(NAME)
        assert served.is_loaded(NAME) and not served.is_base(NAME) and served.is_base("base")
        busy = manager.lora_registry.get_all_adapters()[NAME].lora_id
        uses_of(manager).hold(busy)
        deleting = asyncio.create_task(served.unload(NAME, deleted=True))
        await until(lambda: NAME in updates_of(manager).leaving)
        assert not served.is_loaded(NAME)
        with pytest.raises(ValueError, match=NAME):
            await ask(service, NAME)
        assert manager.unloads() == []
        uses_of(manager).let_go(busy)
        assert await deleting == ""
        assert manager.unloads() == [busy]
        await service.send(state(7, adapters=[NAME, OTHER]))  # an older word of the service
        await until(lambda: service.publisher.dormant() == [OTHER])
        assert (await service.publish(NAME)).ok
        assert not served.is_loaded(NAME) and manager.loads() == [NAME]


@run
async def test_what_uses_a_deleted_model_for_ever_keeps_it_and_says_so(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        busy = service.manager.lora_registry.get_all_adapters()[NAME].lora_id
        uses_of(service.manager).hold(busy)
        before, unload.QUIET_S = unload.QUIET_S, 0.2
        try:
            assert "is still loaded" in await models(service).unload(NAME, deleted=True)
        finally:
            unload.QUIET_S = before
        assert models(service).is_loaded(NAME)
        uses_of(service.manager).let_go(busy)
        assert await models(service).unload(NAME, deleted=True) == ""
        assert not models(service).is_loaded(NAME)


@run
async def test_a_model_that_is_not_loaded_is_forgotten(folder: Path) -> None:
    async with connected(folder) as service:
        await service.send(state(7, adapters=[NAME]))
        await until(lambda: service.publisher.dormant() == [NAME])
        waiting = asyncio.create_task(ask(service, NAME))
        await service.receive(internal.AdapterWanted)
        assert await models(service).unload(NAME, deleted=True) == ""
        with pytest.raises(ValueError, match="it was deleted"):
            await waiting
        assert service.publisher.dormant() == [] and service.manager.requests == []


@run
async def test_a_model_that_is_deleted_while_it_is_loaded_is_put_away(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        manager.polls_left = 10**6
        await service.send(publish(NAME))
        await until(lambda: manager.loads() == [NAME])
        assert await models(service).unload(NAME, deleted=True) == ""
        manager.polls_left = 0  # the scheduler has it now
        await service.receive(internal.AdapterPublished)
        assert len(manager.unloads()) == 1
        assert not models(service).is_loaded(NAME)


@run
async def test_an_adapter_of_the_operator_is_unloaded(folder: Path) -> None:
    async with connected(folder) as service:
        await service.manager.load_lora_adapter(LoadLoRAAdapterReqInput(lora_name="mine", lora_path="/mine"))
        assert models(service).is_loaded("mine")
        assert await models(service).unload("mine", deleted=False) == ""
        assert not models(service).is_loaded("mine")
        service.manager.unload_error = "rank 0 refuses"
        await service.manager.load_lora_adapter(LoadLoRAAdapterReqInput(lora_name="mine", lora_path="/mine"))
        assert "rank 0 refuses" in await models(service).unload("mine", deleted=False)

"""Names of checkpoints: brought from the service when they are first asked for, on SGLang's own
registry, and a 404 in its handlers where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput, UnloadLoRAAdapterReqInput

from sglang_harli.managers.http.model_names import MissingModelError, MissingModelText, find_adapter
from sglang_harli.managers.http.publisher import TENSOR_PATH
from sglang_harli.patches.lora.request_counts import uses_of
from sglang_harli.protocol import internal
from support.publication import Service, connected, hook_publisher, publish, run, state, until

ADAPTER = "base-ft-first-00000001"
NAME, OTHER = f"{ADAPTER}-step-20", f"{ADAPTER}-step-40"


@pytest.fixture(autouse=True)
def hooks(sglang_patches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_publisher(monkeypatch)


def asking(service: Service, path: Any) -> asyncio.Task[GenerateReqInput]:
    async def ask() -> GenerateReqInput:
        request = GenerateReqInput(text=["x"] * len(path) if isinstance(path, list) else "x", lora_path=path)
        await service.manager._validate_and_resolve_lora(request)
        return request

    return asyncio.create_task(ask())


async def refuse(service: Service, name: str, code: str, text: str) -> None:
    assert (await service.receive(internal.AdapterWanted)).name == name
    await service.send(internal.AdapterRefused(name=name, code=code, text=text))


@run
async def test_a_checkpoint_is_loaded_when_it_is_first_asked_for(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        assert find_adapter(manager, NAME) == (NAME, False)
        assert find_adapter(manager, f"base:{NAME}") == (NAME, False)
        asked = [asking(service, NAME) for _ in range(2)]
        assert (await service.receive(internal.AdapterWanted)).name == NAME
        await service.send(publish(NAME))
        ref = [(await one).lora_id for one in asked]
        assert ref == [manager.lora_registry.get_all_adapters()[NAME].lora_id] * 2
        assert manager.lora_ref_cache[NAME].lora_path == TENSOR_PATH
        assert manager.loads() == [NAME], "once for both"
        await asking(service, NAME)


@run
async def test_a_checkpoint_that_is_not_there_is_a_404_and_is_asked_for_again(folder: Path) -> None:
    async with connected(folder) as service:
        for _ in range(2):
            asked = asking(service, [None, NAME])
            await refuse(service, NAME, "not_found", "it is not kept any more")
            with pytest.raises(MissingModelError) as caught:
                await asked
            assert type(str(caught.value)) is MissingModelText
            assert str(caught.value) == f"The model '{NAME}' does not exist: it is not kept any more"
            assert NAME not in service.manager.lora_ref_cache, "names of no checkpoint are not kept"
        asked = asking(service, NAME)  # it is saved by now
        await service.receive(internal.AdapterWanted)
        await service.send(publish(NAME))
        assert (await asked).lora_id


@run
async def test_other_trouble_is_none_of_the_names(folder: Path) -> None:
    async with connected(folder) as service:
        asked = asking(service, NAME)
        await refuse(service, NAME, "adapter_failed", "the disk is full")
        with pytest.raises(ValueError, match="the disk is full") as caught:
            await asked
        assert not isinstance(caught.value, MissingModelError)
        assert NAME not in service.manager.lora_ref_cache
        service.publisher.go_down("the service was given up")
        with pytest.raises(ValueError, match="given up"):
            await asking(service, NAME)


@run
async def test_a_checkpoint_that_was_pruned_is_forgotten_when_it_is_evicted(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        await service.send(state(7, adapters=[NAME]))  # of an earlier run of the server
        await until(lambda: service.publisher.dormant() == [NAME])
        asked = asking(service, NAME)
        await service.receive(internal.AdapterWanted)
        await service.send(publish(NAME))
        uses_of(service.manager).let_go((await asked).lora_id)  # its request has ended
        await service.receive(internal.AdapterPublished)
        assert (await service.publish(OTHER)).ok
        await until(lambda: service.publisher.dormant() == [NAME])
        asked = asking(service, NAME)
        await refuse(service, NAME, "not_found", "it is not kept any more")
        with pytest.raises(MissingModelError):
            await asked
        assert service.publisher.dormant() == []


@run
async def test_a_checkpoint_of_another_base_is_unloaded_and_says_so(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        await service.send(state(7, others={"its base is another": [NAME]}))
        await until(lambda: NAME not in service.manager.lora_registry.get_all_adapters())
        with pytest.raises(ValueError, match="its base is another"):
            await asking(service, NAME)
        asked = asking(service, OTHER)
        await refuse(service, OTHER, "other_base", "its base is another")
        with pytest.raises(ValueError, match="its base is another"):
            await asked


@run
async def test_a_checkpoint_that_the_operator_unloads_stays_away(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        unload = UnloadLoRAAdapterReqInput(lora_name=NAME)
        assert (await service.manager.unload_lora_adapter(unload)).success
        with pytest.raises(MissingModelError, match="unloaded by the operator"):
            await asking(service, NAME)

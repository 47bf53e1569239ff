"""Publication: SGLang's own registry, communicators and lock with our patches, a real socket pair,
and a scheduler of dicts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    LoadLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
)

from sglang_harli.managers.http import publisher as publisher_module
from sglang_harli.managers.http.publisher import TENSOR_PATH
from sglang_harli.managers.http.tokenizer_handover import TokenizerHandover
from sglang_harli.patches.lora.request_counts import uses_of
from sglang_harli.patches.lora.unload import updates_of
from sglang_harli.protocol import internal, tokenizer_state
from sglang_harli.protocol.tokenizer_state import ChatTemplate, TokenizerState
from sglang_harli.sglang_versions.current import lora_unloads
from support.publication import connected, hook_publisher, publish, run, state, until

NAME, OTHER, THIRD = "base-ft-first-00000001", "base-ft-second-00000002", "base-ft-third-00000003"


@pytest.fixture(autouse=True)
def hooks(sglang_patches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_publisher(monkeypatch)


# ------------------------------------------------------------------ publication
@run
async def test_adapter_is_registered_when_the_scheduler_has_loaded_it(folder: Path) -> None:
    async with connected(folder) as service:
        answer = await service.publish(NAME)
        assert (answer.ok, answer.job, answer.name, answer.text) == (True, "ftjob-1", NAME, "")
        ref = service.manager.lora_registry.get_all_adapters()[NAME]
        assert ref.lora_path == TENSOR_PATH
        assert service.manager.lora_ref_cache[NAME] is ref
        begin, *polls = service.manager.requests
        assert begin.method == "harli/load_adapter"
        assert begin.body["lora_id"] == ref.lora_id
        assert begin.body["config"] == {"r": 2, "lora_alpha": 4}
        assert begin.body["slot"]["tensors"][0]["name"] == "a.lora_A.weight"
        assert [p.body for p in polls] == [{"lora_id": ref.lora_id, "urgent": False}] * 3


@run
async def test_repeated_publication_of_a_served_name_answers_ok(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        assert (await service.publish(NAME)).ok
        assert service.manager.loads() == [NAME]


@run
async def test_adapter_that_does_not_load_is_not_registered(folder: Path) -> None:
    async with connected(folder) as service:
        service.manager.load_error = "rank 64 is above --max-lora-rank 16"
        answer = await service.publish(NAME)
        assert (answer.ok, answer.code, answer.text) == (False, "load_failed", service.manager.load_error)
        assert not answer.passing
        service.manager.passing = True  # the scheduler lacked memory, or could not map the slot
        assert (await service.publish(NAME)).passing
        assert NAME not in service.manager.lora_registry.get_all_adapters()
        service.manager.load_error = ""
        assert (await service.publish(NAME)).ok


@run
async def test_publication_without_lora_serving_names_the_flag(folder: Path) -> None:
    async with connected(folder, enable_lora=False) as service:
        answer = await service.publish(NAME)
        assert (answer.ok, answer.code) == (False, "lora_disabled")
        assert "--enable-lora" in answer.text


@run
async def test_publication_is_refused_when_all_places_are_pinned(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        await service.manager.lora_registry.register(LoRARef(lora_name="x", lora_path="/x", pinned=True))
        answer = await service.publish(NAME)
        assert (answer.ok, answer.code) == (False, "no_room")
        assert "--max-loaded-loras 1" in answer.text


# ------------------------------------------------------------------ eviction
@run
async def test_least_recently_used_adapter_is_evicted_and_comes_back(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        manager = service.manager
        await service.publish(NAME)
        assert (await service.publish(OTHER)).ok
        await until(lambda: manager.lora_registry.num_registered_loras == 1)
        assert service.publisher.dormant() == [NAME]

        request = GenerateReqInput(text="hello", lora_path=NAME)
        asked = asyncio.gather(*[manager._validate_and_resolve_lora(r) for r in (request,)])
        wanted = await service.receive(internal.AdapterWanted)
        assert wanted.name == NAME
        await service.send(publish(NAME))
        await asked
        assert request.lora_id == manager.lora_registry.get_all_adapters()[NAME].lora_id
        assert manager.loads() == [NAME, OTHER, NAME]


@run
async def test_request_for_an_evicted_adapter_waits_only_so_long(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        await service.publish(NAME)
        waits = [service.publisher.bring_back(NAME, timeout_s=0.1) for _ in range(2)]
        for wrong in await asyncio.gather(*waits):
            assert "did not bring it back within 0.1 s: try again" in wrong
        again = asyncio.create_task(service.publisher.bring_back(NAME))
        for _ in range(2):  # one question for the first two, and a new one
            await service.receive(internal.AdapterWanted)
        await service.publish(NAME)
        assert await again == ""


@run
async def test_adapter_that_cannot_come_back_says_why(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        await service.manager.lora_registry.unregister(NAME)
        service.manager.load_error = "slot is gone"
        request = GenerateReqInput(text="hello", lora_path=NAME)
        asked = asyncio.create_task(service.manager._validate_and_resolve_lora(request))
        await service.receive(internal.AdapterWanted)
        await service.send(publish(NAME))
        with pytest.raises(ValueError, match=f"{NAME}: slot is gone"):
            await asked


@run
async def test_an_adapter_in_use_is_not_evicted_and_nothing_waits_for_it(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        manager = service.manager
        await service.publish(NAME)
        busy = manager.lora_registry.get_all_adapters()[NAME].lora_id
        uses_of(manager).hold(busy)
        assert (await service.publish(OTHER)).ok
        assert (await service.publish(THIRD)).ok
        await until(lambda: not updates_of(manager).tasks)
        assert set(manager.lora_registry.get_all_adapters()) == {NAME, THIRD}  # all but one are idle
        assert service.publisher.dormant() == [OTHER]
        uses_of(manager).let_go(busy)
        await until(lambda: set(manager.lora_registry.get_all_adapters()) == {THIRD})


# ------------------------------------------------------------------ nothing is waited for under the lock
@run
async def test_operators_load_and_unload_while_an_adapter_is_being_loaded(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        await service.publish(OTHER)
        manager.stuck = {NAME}
        await service.send(publish(NAME))
        await until(lambda: manager.loads() == [OTHER, NAME])
        result = await manager.load_lora_adapter(LoadLoRAAdapterReqInput(lora_name="mine", lora_path="/mine"))
        assert result.success
        for name in ("mine", OTHER):
            assert (await manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))).success


@run
async def test_a_loading_that_does_not_get_on_is_put_away_and_the_next_one_comes(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        manager.stuck = {NAME}
        before, publisher_module.QUIET_S = publisher_module.QUIET_S, 0.5
        try:
            answer = await service.publish(NAME)
        finally:
            publisher_module.QUIET_S = before
        assert (answer.ok, answer.code, answer.passing) == (False, "not_ready", True)
        assert "not one slice of it could be loaded" in answer.text
        assert len(manager.abandoned) == 1
        assert (await service.publish(OTHER)).ok
        manager.stuck, manager.stuck_ids = set(), set()
        assert (await service.publish(NAME)).ok


@run
async def test_an_unexpected_error_is_answered_and_the_service_is_heard(folder: Path) -> None:
    async with connected(folder) as service:
        for broken in (TypeError("a str is no int"), ValueError("already exists"), AssertionError()):
            service.manager.lora_registry.register = failing(broken)  # type: ignore[method-assign]
            answer = await service.publish(NAME)
            assert (answer.ok, answer.code) == (False, "internal")
            assert type(broken).__name__ in answer.text
            del service.manager.lora_registry.register
            assert service.publisher.listening
        assert (await service.publish(NAME)).ok
        await service.send(state(7))
        await until(lambda: service.publisher.state)
    assert not service.publisher.listening


def failing(error: Exception) -> Callable[..., Any]:
    async def fail(*args: Any) -> None:
        raise error

    return fail


@run
async def test_an_adapter_that_the_operator_is_unloading_neither_answers_nor_is_loaded(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        await service.publish(NAME)
        busy = manager.lora_registry.get_all_adapters()[NAME].lora_id
        uses_of(manager).hold(busy)
        unloading = asyncio.create_task(
            manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=NAME))
        )
        await until(lambda: NAME in updates_of(manager).leaving)
        with pytest.raises(ValueError, match="is being unloaded"):
            await manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))
        answer = await service.publish(NAME)
        assert (answer.ok, answer.code, answer.passing) == (False, "not_ready", True)
        uses_of(manager).let_go(busy)
        assert (await unloading).success
        assert manager.loads() == [NAME]


@run
async def test_an_adapter_of_another_base_goes_when_its_requests_have_ended_and_nothing_waits(
    folder: Path,
) -> None:
    async with connected(folder) as service:
        manager = service.manager
        await service.publish(NAME)
        busy = manager.lora_registry.get_all_adapters()[NAME].lora_id
        uses_of(manager).hold(busy)
        await service.send(state(7, others={"its base is another": [NAME]}))
        await until(lambda: NAME in updates_of(manager).leaving)
        assert (await service.publish(OTHER)).ok
        assert not any(isinstance(r, UnloadLoRAAdapterReqInput) for r in manager.requests)
        uses_of(manager).let_go(busy)
        await until(lambda: isinstance(manager.requests[-1], UnloadLoRAAdapterReqInput))
        with pytest.raises(ValueError, match="its base is another"):
            await manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))


@run
async def test_an_adapter_of_another_base_answers_no_more_while_its_unload_waits(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        async with service.manager.lora_update_lock:
            await service.send(state(7, others={"its base is another": [NAME]}))
            await until(lambda: NAME in service.publisher.others)
            assert NAME in service.manager.lora_registry.get_all_adapters()
            for path in (NAME, [None, NAME]):
                with pytest.raises(ValueError, match="not served here: its base is another"):
                    await service.manager._validate_and_resolve_lora(
                        GenerateReqInput(text="x", lora_path=path)
                    )


# ------------------------------------------------------------------ unloading
@run
async def test_adapter_that_the_operator_unloads_is_gone(folder: Path) -> None:
    async with connected(folder) as service:
        await service.publish(NAME)
        result = await service.manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=NAME))
        assert result.success
        assert service.publisher.dormant() == []
        answer = await service.publish(NAME)  # a restarted service publishes all it knows
        assert answer.ok
        assert "unloaded by the operator" in answer.text
        assert NAME not in service.manager.lora_registry.get_all_adapters()
        with pytest.raises(ValueError, match="never been loaded"):
            await service.manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))


@run
async def test_an_evicted_adapter_that_the_operator_unloads_does_not_come_back(folder: Path) -> None:
    async with connected(folder, max_loaded_loras=1) as service:
        for name in (NAME, OTHER):
            await service.publish(name)
        await until(lambda: service.publisher.dormant() == [NAME])
        assert (await service.manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=NAME))).success
        assert service.publisher.dormant() == []
        with pytest.raises(ValueError, match="never been loaded"):
            await service.manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))


@run
async def test_an_adapter_that_the_operator_unloads_while_it_comes_back_stays_away(folder: Path) -> None:
    async with connected(folder) as service:
        manager, publisher = service.manager, service.publisher
        await service.send(state(7, adapters=[NAME]))
        await until(lambda: publisher.dormant() == [NAME])
        manager.polls_left = 10**6
        asked = asyncio.create_task(
            manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))
        )
        await service.receive(internal.AdapterWanted)
        await service.send(publish(NAME))
        await until(lambda: manager.loads() == [NAME])
        assert (await manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=NAME))).success
        with pytest.raises(ValueError, match="unloaded by the operator"):
            await asked
        manager.polls_left = 0  # the scheduler has it now
        answer = await service.receive(internal.AdapterPublished)
        assert answer.ok and "unloaded by the operator" in answer.text
        (loading,) = [r for r in manager.requests if getattr(r, "method", "") == "harli/load_adapter"]
        unloads = [r.lora_id for r in manager.requests if isinstance(r, UnloadLoRAAdapterReqInput)]
        assert unloads == [loading.body["lora_id"]]
        assert NAME not in manager.lora_registry.get_all_adapters() and publisher.dormant() == []
        with pytest.raises(ValueError, match="never been loaded"):
            await manager._validate_and_resolve_lora(GenerateReqInput(text="x", lora_path=NAME))


@run
async def test_an_unload_that_failed_is_done_before_the_name_is_loaded_again(folder: Path) -> None:
    async with connected(folder) as service:
        manager = service.manager
        unfinished = lora_unloads.unfinished(manager)
        unfinished[NAME] = "the-old-id"
        manager.unload_error = "the device is gone"
        answer = await service.publish(NAME)
        assert (answer.ok, answer.code) == (False, "load_failed")
        assert "could not be put away: the device is gone" in answer.text
        assert manager.loads() == [] and unfinished == {NAME: "the-old-id"}
        manager.unload_error = ""
        assert (await service.publish(NAME)).ok
        assert manager.unloads() == ["the-old-id"] * 2 and unfinished == {}
        assert NAME in manager.lora_registry.get_all_adapters()


@run
async def test_an_adapter_that_could_not_be_put_away_goes_when_the_operator_unloads_it_again(
    folder: Path,
) -> None:
    async with connected(folder) as service:
        manager = service.manager
        unload = UnloadLoRAAdapterReqInput(lora_name=NAME)
        await service.send(state(7, adapters=[NAME]))
        await until(lambda: service.publisher.dormant() == [NAME])
        manager.polls_left = 10**6
        await service.send(publish(NAME))
        await until(lambda: manager.loads() == [NAME])
        assert (await manager.unload_lora_adapter(unload)).success  # while it is being loaded
        manager.unload_error, manager.polls_left = "the device is gone", 0
        answer = await service.receive(internal.AdapterPublished)
        assert not answer.ok and "could not be put away" in answer.text
        again = await manager.unload_lora_adapter(unload)
        assert not again.success and "the device is gone" in again.error_message
        manager.unload_error = ""
        assert (await manager.unload_lora_adapter(unload)).success
        assert len(set(manager.unloads())) == 1 and lora_unloads.unfinished(manager) == {}
        assert "does not exist" in (await manager.unload_lora_adapter(unload)).error_message


@run
async def test_others_adapters_go_sglangs_way(folder: Path) -> None:
    async with connected(folder) as service:
        request = LoadLoRAAdapterReqInput(lora_name="mine", lora_path="/adapters/mine")
        loading = asyncio.create_task(service.manager.load_lora_adapter(request))
        assert (await loading).success
        assert service.manager.requests == [request]


# ------------------------------------------------------------------ the service
@run
async def test_health_opens_once_the_service_and_the_scheduler_have_met(folder: Path) -> None:
    async with connected(folder) as service:
        hello = await service.receive(internal.HttpHello)
        assert hello.served_model_name == "base"
        await service.send(state(7, scheduler_seen=False))
        await until(lambda: service.publisher.state)
        assert not service.publisher.was_ready
        await service.send(state(7))
        await until(lambda: service.publisher.was_ready)
        await service.send(state(7, scheduler_seen=False))
        await until(lambda: service.publisher.state and not service.publisher.state.scheduler_seen)
        assert service.publisher.was_ready


@run
async def test_restarted_service_is_greeted_and_asked_again(folder: Path) -> None:
    async with connected(folder) as service:
        await service.receive(internal.HttpHello)
        await service.send(state(7))
        waiting = asyncio.create_task(service.publisher.bring_back(NAME))
        await service.receive(internal.AdapterWanted)
        await service.send(state(8))
        await service.receive(internal.HttpHello)
        await service.receive(internal.AdapterWanted)
        await service.send(state(8))  # lost
        await service.receive(internal.HttpHello)
        waiting.cancel()


@run
async def test_a_tokenizer_that_cannot_be_handed_over_is_tried_at_growing_intervals(folder: Path) -> None:
    handover = TokenizerHandover(TokenizerState(chat=ChatTemplate(), refusal="none"), folder / "missing")
    written: list[float] = []
    write = handover.write

    def counted() -> bool:
        written.append(time.monotonic())
        return write()

    handover.write = counted
    async with connected(folder, handover=handover) as service:
        await service.receive(internal.HttpHello)
        until_s = time.monotonic() + 2.5
        while time.monotonic() < until_s:  # as often as the service says so
            await service.send(state(7, tokenizer_lost=True, greeted_by=os.getpid()))
            await asyncio.sleep(0.01)
        assert 2 <= len(written) <= 3  # at once, a second later, two seconds later
        (folder / "missing").mkdir()
        hello = await service.receive(internal.HttpHello)
        assert hello.tokenizer == handover.fingerprint
        assert tokenizer_state.read(folder / "missing").fingerprint == handover.fingerprint
        await service.send(state(7))
        await until(lambda: service.publisher._hand_over_pause_s == 0.0)


@run
async def test_adapters_of_earlier_runs_are_known_at_once_and_load_when_asked_for(folder: Path) -> None:
    async with connected(folder) as service:
        await service.send(state(7, adapters=[NAME]))
        await until(lambda: service.publisher.dormant() == [NAME])
        request = GenerateReqInput(text="hello", lora_path=NAME)
        asked = asyncio.create_task(service.manager._validate_and_resolve_lora(request))
        await service.receive(internal.AdapterWanted)
        await service.send(publish(NAME))
        await asked
        assert request.lora_id


@run
async def test_refused_adapter_is_an_error_at_once(folder: Path) -> None:
    async with connected(folder) as service:
        await service.send(state(7, adapters=[NAME]))
        await until(lambda: service.publisher.dormant() == [NAME])
        request = GenerateReqInput(text="hello", lora_path=NAME)
        asked = asyncio.create_task(service.manager._validate_and_resolve_lora(request))
        await service.receive(internal.AdapterWanted)
        for _ in range(2):  # the second one finds nobody
            await service.send(internal.AdapterRefused(name=NAME, code="adapter_failed", text="it is torn"))
        with pytest.raises(ValueError, match=f"{NAME}: it is torn"):
            await asked
        assert (await service.publish(NAME)).ok


@run
async def test_without_a_service_nobody_waits_for_an_adapter(folder: Path) -> None:
    async with connected(folder) as service:
        await service.receive(internal.HttpHello)
        waiting = asyncio.create_task(service.publisher.bring_back(NAME))
        await service.receive(internal.AdapterWanted)
        service.publisher.go_down("the finetune service ended 8 times in a row")
        for wrong in (await waiting, await service.publisher.bring_back(NAME)):
            assert "ended 8 times in a row: restart the server" in wrong


@run
async def test_only_the_newest_question_is_worked_on_and_answered(folder: Path) -> None:
    async with connected(folder) as service:
        async with service.manager.lora_update_lock:  # the first question waits, three come behind it
            await service.send(publish(NAME, request=3))
            for number in (4, 5, 6):
                await service.send(publish(OTHER, request=number))
            await until(lambda: service.publisher._queue.qsize() == 3)
        answers = [await service.receive(internal.AdapterPublished) for _ in range(2)]
        assert [(a.name, a.request, a.ok) for a in answers] == [(NAME, 3, True), (OTHER, 6, True)]
        assert service.manager.loads() == [NAME, OTHER]


@run
async def test_unexpected_answer_of_the_scheduler_is_an_error_of_this_adapter_alone(folder: Path) -> None:
    async with connected(folder) as service:
        for response in ([], None, ["loaded"], [None]):
            service.manager.response = response
            answer = await service.publish(NAME)
            assert (answer.ok, answer.code, answer.passing) == (False, "load_failed", False)
            assert "unexpected answer" in answer.text
        service.manager.response = ...
        assert (await service.publish(NAME)).ok


@run
async def test_garbage_is_dropped(folder: Path) -> None:
    async with connected(folder) as service:
        for junk in (b"", b"\xc1", internal.encode(internal.Welcome(pid=1))):
            await service.socket.send(junk)
        assert (await service.publish(NAME)).ok

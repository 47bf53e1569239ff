"""An adapter is in use exactly while a call or a request uses it: SGLang's TokenizerManager, driven
by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import (
    AbortReq,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    ShutdownReq,
)
from sglang.srt.utils import MultiprocessingSerializer

from sglang_harli.patches import shutdown_drain
from sglang_harli.patches.lora import unload
from support.model_runner import NEWEST
from support.models import make_model
from support.tokenizer_side import Side, Sides, settled

GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def drive(sglang_patches: None, model: str) -> Iterator[Callable[..., None]]:
    """``drive(scenario, **options)``: see ``Sides``."""
    sides = Sides(model)
    yield sides.drive
    sides.close()


def body(lora: Any = "one", n: int = 1, text: Any = "a b", **more: Any) -> dict[str, Any]:
    return {"text": text, "lora_path": lora, "sampling_params": {**GREEDY, "n": n}, **more}


# ------------------------------------------------------------------ every end of a request
def test_a_request_holds_its_adapter_until_it_ends(drive):
    async def scenario(side: Side) -> None:
        asked = side.ask(**body())
        (rid,) = await side.came(1)
        assert side.uses("one") == 1 and side.uses("two") == 0
        await side.finish(rid)
        await asked
        await settled()

    drive(scenario)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("text", ["a b", ["a b", "c"]])
def test_several_answers_take_off_what_they_put_on(drive, n, text):
    async def scenario(side: Side) -> None:
        asked = side.ask(**body(n=n, text=text))
        prompts = 1 if isinstance(text, str) else len(text)
        for _ in range(prompts):  # the prefix that the answers share
            (rid,) = await side.came(1)
            await side.finish(rid)
        rids = await side.came(prompts * n)
        assert side.uses("one") >= prompts * n
        assert len(side.rid_to_state) == prompts * n
        for rid in rids[:-1]:
            await side.finish(rid)
            assert side.uses("one") > 0
        await side.finish(rids[-1])
        assert len(await asked) == prompts * n
        await settled()

    drive(scenario)


def test_a_batch_of_two_adapters_and_the_base_counts_each(drive):
    async def scenario(side: Side) -> None:
        asked = side.ask(**body(["one", None, "two", "one"], text=["a", "b", "c", "d"]))
        rids = await side.came(4)
        assert [side.waiting[rid].lora_id for rid in rids] == [
            side.adapters.get(name or "") for name in ("one", None, "two", "one")
        ]
        await side.finish(rids[0], rids[2])
        assert side.uses("one") > 0
        await side.finish(rids[1], rids[3])
        assert len(await asked) == 4
        await settled()

    drive(scenario)


def test_an_abort_in_the_waiting_queue_lets_go(drive):
    async def scenario(side: Side) -> None:
        asked = [side.ask(**body()) for _ in range(3)]
        for rid in await side.came(3):
            side.drop(rid)
        await asyncio.gather(*asked)
        await settled()
        assert side.uses("one") == 0
        assert (await side.unload("one")).success

    drive(scenario)


@pytest.mark.parametrize("status", [400, 500, 503])
@pytest.mark.parametrize("n", [1, 3])
def test_an_error_of_the_scheduler_lets_go_once(drive, status, n):
    async def scenario(side: Side) -> None:
        asked = side.ask(**body(n=n))
        if n > 1:
            await side.finish(*await side.came(1))
        rids = await side.came(n)
        await side.refuse(rids[0], status)
        with pytest.raises(Exception, match="no"):
            await asked
        await settled()
        # The other answers still run, or are aborted.
        assert side.uses("one") == len(side.waiting) == (0 if NEWEST else n - 1)
        await side.finish(*side.waiting)

    drive(scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_ids": [10**6], "text": None},  # beyond the vocabulary
        {"text": "a " * 2000},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"nothing": 1}},
        {"text": ["a b", "a " * 2000]},  # the first part is sent already
        {"text": ["a b", "c"], "sampling_params": [GREEDY, {"temperature": -1}]},
    ],
)
def test_a_request_that_is_refused_leaves_nothing(drive, wrong):
    async def scenario(side: Side) -> None:
        with pytest.raises((ValueError, TypeError)):
            await side.ask(**{**body(), **wrong})
        await settled()
        assert side.uses("one") == 0 and not side.waiting

    drive(scenario)


def test_an_id_that_is_taken_is_refused_and_the_others_are_free(drive):
    async def scenario(side: Side) -> None:
        first = side.ask(**body(rid="taken"))
        (rid,) = await side.came(1)
        for text, rids in (("a", "taken"), (["a", "b"], ["free", "taken"])):
            with pytest.raises(ValueError, match="Duplicate request ID detected: taken"):
                await side.ask(**body(text=text, rid=rids))
        await settled()
        assert list(side.waiting) == ["taken"] and set(side.rid_to_state) == {"taken"}
        await side.finish(rid)
        await first

    drive(scenario)


def test_a_reader_that_goes_away_before_anything_was_sent_leaves_nothing(drive):
    async def scenario(side: Side) -> None:
        async with side.is_pause_cond:
            side.is_pause = True
        stream = side.generate_request(GenerateReqInput(**body(n=2), stream=True), None)
        reader = asyncio.create_task(stream.__anext__())
        await side.until(lambda: side.rid_to_state)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await stream.aclose()
        assert not side.rid_to_state
        side.is_pause = False

    drive(scenario)


def test_a_reader_that_goes_away_leaves_the_adapter_to_the_request_as_long_as_it_runs(drive):
    async def scenario(side: Side) -> None:
        stream = side.generate_request(GenerateReqInput(**body(), stream=True), None)
        reader = asyncio.create_task(stream.__anext__())
        (rid,) = await side.came(1)
        await side.token(rid)
        await reader
        await stream.aclose()
        assert side.uses("one") == 1
        await settled()
        assert list(side.waiting) == ([] if NEWEST else [rid])  # SGLang aborts it, or it runs on
        assert side.uses("one") == len(side.waiting)
        await side.finish(*side.waiting)

    drive(scenario)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("text", ["a b", ["a b", "c"]])
def test_a_reader_that_reads_no_more_holds_nothing_once_its_requests_have_ended(drive, n, text):
    async def scenario(side: Side) -> None:
        stream = side.generate_request(GenerateReqInput(**body(n=n, text=text), stream=True), None)
        reader = asyncio.create_task(stream.__anext__())
        prompts = 1 if isinstance(text, str) else len(text)
        for _ in range(prompts if n > 1 else 0):  # the prefix that the answers share
            (rid,) = await side.came(1)
            assert side.uses("one") > 1
            await side.finish(rid)
        rids = await side.came(prompts * n)
        await side.token(*rids)
        await reader
        await side.finish(*rids)
        await settled()
        assert side.uses("one") == 0
        assert (await side.unload("one")).success
        await stream.aclose()

    drive(scenario)


@pytest.mark.skipif(NEWEST, reason="it keeps a request's state until the scheduler has said that it ended")
def test_an_id_of_a_call_that_is_gone_is_taken_as_long_as_the_scheduler_has_it(drive):
    async def scenario(side: Side) -> None:
        async with asyncio.TaskGroup() as group:
            stream = side.generate_request(GenerateReqInput(**body(rid="mine"), stream=True), None)
            reader = group.create_task(stream.__anext__())
            await side.came(1)
            await side.token("mine")
            await reader
        await stream.aclose()
        del side.rid_to_state["mine"]  # as SGLang does where a request fails
        with pytest.raises(ValueError, match="Duplicate request ID detected: mine"):
            await side.ask(**body(rid="mine"))
        await side.finish("mine")
        again = side.ask(**body(rid="mine"))
        await side.finish(*await side.came(1))
        await again

    drive(scenario)


@pytest.mark.parametrize(("text", "rid"), [("a", ""), (["a", "b"], ["", "b"]), (["a", "b"], ["b", ""])])
def test_an_empty_id_which_would_abort_every_request_is_refused(drive, text, rid):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError, match="rid is empty"):
            await side.ask(**body(text=text, rid=rid))

    drive(scenario)


def test_a_client_cannot_take_the_ids_of_health_checks_for_an_adapter(drive):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError, match="the server's own"):
            await side.ask(**body(rid="HEALTH_CHECK_1"))

    drive(scenario)


# ------------------------------------------------------------------ unloading
def test_an_unload_waits_for_the_requests_and_not_for_the_lock(drive):
    async def scenario(side: Side) -> None:
        asked = side.ask(**body(n=2))
        await side.finish(*await side.came(1))
        rids = await side.came(2)
        unloading = asyncio.create_task(side.unload("one"))
        await side.until(lambda: "one" not in side.lora_registry.get_all_adapters())
        await side.load("three")  # others go on
        assert (await side.unload("three")).success
        with pytest.raises(ValueError, match="is being unloaded"):
            await side.ask(**body())
        again = await side.unload("one")
        assert not again.success and "is being unloaded" in again.error_message
        await side.finish(rids[0])
        await asyncio.sleep(3 * unload.LOOK_S)
        assert not unloading.done()
        await side.finish(rids[1])
        assert (await unloading).success and "one" not in side.adapters
        await asked

    drive(scenario)


def test_an_unload_that_nothing_comes_of_is_given_up_and_the_adapter_answers_as_before(drive, monkeypatch):
    monkeypatch.setattr(unload, "QUIET_S", 0.5)

    async def scenario(side: Side) -> None:
        asked = side.ask(**body())
        (rid,) = await side.came(1)
        unloading = asyncio.create_task(side.unload("one"))
        for _ in range(4):  # longer than the limit, but it gets on
            await asyncio.sleep(0.2)
            await side.token(rid)
            assert not unloading.done()
        result = await unloading
        assert not result.success and "1 requests use it" in result.error_message
        assert side.lora_registry.get_all_adapters()["one"].lora_id == side.adapters["one"]
        more = side.ask(**body())
        await side.finish(*await side.came(2))
        await asyncio.gather(asked, more)
        await settled()
        assert (await side.unload("one")).success

    drive(scenario)


def test_an_unload_that_the_scheduler_refuses_leaves_the_name(drive):
    async def scenario(side: Side) -> None:
        side.refusing = "not now"
        result = await side.unload("one")
        assert not result.success and result.error_message == "not now"
        side.refusing = ""
        asked = side.ask(**body())
        await side.finish(*await side.came(1))
        await asked

    drive(scenario)


@pytest.mark.skipif(not NEWEST, reason="there the first rank answers for all")
def test_an_unload_that_some_ranks_refuse_is_done_when_it_is_asked_for_again(drive):
    async def scenario(side: Side) -> None:
        lora_id, side.other_rank = side.adapters["one"], "the device is gone"
        assert "the device is gone" in (await side.unload("one")).error_message
        with pytest.raises(ValueError, match="one"):  # it would be wrong on one rank
            await side.ask(**body())
        assert side.pending_lora_unloads == {"one": lora_id}
        load = LoadLoRAAdapterReqInput(lora_name="one", lora_path="/adapters/one")
        assert "unload it again first" in (await side.load_lora_adapter(load)).error_message
        side.adapters["one"], side.other_rank = lora_id, ""
        assert (await side.unload("one")).success and side.pending_lora_unloads == {}
        await side.load("one")

    drive(scenario)


@pytest.mark.skipif(not NEWEST, reason="there the first rank answers for all")
def test_a_load_that_some_ranks_refuse_is_taken_back(drive):
    async def scenario(side: Side) -> None:
        load = LoadLoRAAdapterReqInput(lora_name="three", lora_path="/adapters/three")
        side.other_rank = "out of memory"  # also when it is to be taken back
        assert "out of memory" in (await side.load_lora_adapter(load)).error_message
        assert list(side.pending_lora_unloads) == ["three"]
        side.adapters["three"], side.other_rank = side.pending_lora_unloads["three"], ""
        assert (await side.unload("three")).success and side.pending_lora_unloads == {}
        await side.load("three")
        assert "three" in side.lora_registry.get_all_adapters()

    drive(scenario)


def test_a_load_whose_client_goes_away_is_finished(drive):
    async def scenario(side: Side) -> None:
        side.slow = True
        loading = asyncio.create_task(side.load("three"))
        await side.until(lambda: side.lora_update_lock.locked())
        loading.cancel()
        await settled()
        side.slow = False
        side.answer_updates()
        await side.until(lambda: "three" in side.lora_registry.get_all_adapters())
        await side.load("four")  # what answers loads is as it was

    drive(scenario)


@pytest.mark.parametrize("form", ["text", "bytes of text", "bytes"] if NEWEST else ["text"])
def test_tensors_come_to_the_scheduler_in_the_form_that_it_reads(drive, form):
    weights = {"a": [0.5, 1.5], "b": [2.5]}  # tensors would bring file handles of this process
    given: Any = MultiprocessingSerializer.serialize(weights, output_str=form != "bytes")
    if form == "bytes of text":
        given = given.encode()
    tensors: dict[str, Any] = (
        {"serialized_named_tensors": [given]} if NEWEST else {"serialized_tensors": given}
    )

    async def scenario(side: Side) -> None:
        request = LoadLoRAAdapterFromTensorsReqInput(lora_name="three", config_dict={}, **tensors)
        result = await side.load_lora_adapter_from_tensors(request)
        assert result.success and side.adapters["three"] == request.lora_id
        (came,) = [one for one in side.sent if isinstance(one, LoadLoRAAdapterFromTensorsReqInput)]
        if NEWEST:
            (payload,) = came.serialized_named_tensors
            assert type(payload) is bytes
        else:
            payload = came.serialized_tensors
        assert MultiprocessingSerializer.deserialize(payload) == weights

    drive(scenario)


@pytest.mark.skipif(not NEWEST, reason="0.5.16 hands them on as they came")
def test_tensors_that_are_no_payload_are_refused_before_the_scheduler(drive):
    async def scenario(side: Side) -> None:
        request = LoadLoRAAdapterFromTensorsReqInput(
            lora_name="three", config_dict={}, serialized_named_tensors=["no base64 at all: \u00e9"]
        )
        result = await side.load_lora_adapter_from_tensors(request)
        assert not result.success and result.error_message
        assert not any(isinstance(one, LoadLoRAAdapterFromTensorsReqInput) for one in side.sent)

    drive(scenario)


# ------------------------------------------------------------------ eviction
def test_beyond_the_limit_the_least_recently_used_idle_adapter_goes(drive):
    async def scenario(side: Side) -> None:
        busy = side.ask(**body("one"))  # now two is the least recently used
        (rid,) = await side.came(1)
        await side.load("three")
        assert set(side.adapters) == {"one", "three"}
        other = side.ask(**body("three"))
        await side.came(2)
        await side.load("four")  # all others are in use: one too many for now
        assert set(side.adapters) == {"one", "three", "four"}
        await side.finish(rid)
        await busy
        await side.until(lambda: set(side.adapters) == {"three", "four"})
        back = side.ask(**body("one"))  # comes back by its path
        await side.finish(*await side.came(2))
        await asyncio.gather(other, back)
        await side.until(lambda: len(side.adapters) == 2)

    drive(scenario, max_loaded_loras=2, max_loras_per_batch=2)


def test_a_load_is_refused_where_all_places_are_pinned(drive):
    async def scenario(side: Side) -> None:
        for name in ("one", "two"):
            ref = side.lora_registry._registry[name]
            side.lora_registry._registry[name] = type(ref)(
                lora_id=ref.lora_id, lora_name=name, lora_path=ref.lora_path, pinned=True
            )
        with pytest.raises(AssertionError, match="--max-loaded-loras 2 places are taken by pinned"):
            await side.load("three")
        for name in ("one", "two"):
            assert (await side.unload(name)).success

    drive(scenario, max_loaded_loras=2, max_loras_per_batch=2)


# ------------------------------------------------------------------ the end of the server
def test_a_server_that_ends_waits_for_its_requests_as_long_as_they_get_on(drive, monkeypatch):
    monkeypatch.setattr(shutdown_drain, "QUIET_S", 0.6)
    monkeypatch.setattr(shutdown_drain, "LOOK_S", 0.05)

    async def scenario(side: Side) -> None:
        stream = side.generate_request(GenerateReqInput(**body(), stream=True), None)
        reader = asyncio.create_task(stream.__anext__())
        (rid,) = await side.came(1)
        limit = asyncio.create_task(shutdown_drain._limit(side))
        side.gracefully_exit = True
        await side.until(lambda: "shutdown_drain" in side.__dict__)
        late = side.ask(**body())  # comes after the signal: is not waited for
        _, other = await side.came(2)
        for _ in range(4):
            await asyncio.sleep(0.3)
            await side.token(rid)
            assert not limit.done()
        await reader
        await limit  # not another token
        assert not side.rid_to_state
        await stream.aclose()
        await side.finish(rid, other)
        late.cancel()
        side.gracefully_exit = False
        del side.shutdown_drain

    drive(scenario)


class Killed(Exception):
    pass


def test_a_server_ends_under_steady_traffic(drive, monkeypatch):
    """SGLang's own loop, which looks every five seconds."""

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setattr(tokenizer_manager, "kill_process_tree", kill)
    monkeypatch.setattr(shutdown_drain, "LOOK_S", 0.05)

    async def traffic(side: Side) -> list[Any]:
        """A new request before the one before it ends."""
        asked: list[Any] = []
        while side.sent and not isinstance(side.sent[-1], ShutdownReq):
            asked.append(side.ask(**body(stream=len(asked) % 2 == 1)))
            await asyncio.sleep(0.05)
            await side.finish(*list(side.waiting)[:-1])
        await settled()
        ended = [one.exception() or one.result() for one in asked if one.done()]
        for one in asked:
            one.cancel()  # in a server those end with it
        return ended

    async def scenario(side: Side) -> None:
        first = side.ask(**body())
        await side.came(1)
        coming = asyncio.create_task(traffic(side))
        side.gracefully_exit = True
        with pytest.raises(Killed):
            await asyncio.wait_for(side.sigterm_watchdog(), 20)
        await side.finish(*side.waiting)
        late = await coming
        assert (await first)["text"] == "x"
        assert isinstance(late[0], dict)  # answered while the first was waited for
        refused = [one for one in late if isinstance(one, Exception)]
        assert {getattr(one, "status_code", 400) for one in refused} == {400, 503}
        assert all("the server is ending" in str(one) for one in refused)
        side.gracefully_exit = False
        del side.shutdown_drain

    drive(scenario)


def test_a_server_without_requests_ends_at_once(drive):
    async def scenario(side: Side) -> None:
        side.gracefully_exit = True
        await asyncio.wait_for(shutdown_drain._limit(side), 5)
        side.gracefully_exit = False
        del side.shutdown_drain

    drive(scenario)


# ------------------------------------------------------------------ the prefix cache's key
def test_no_key_of_a_client_is_that_of_an_adapter(drive):
    async def scenario(side: Side) -> None:
        lora_id = side.adapters["one"]
        texts = ("", lora_id, "k", f"1:k{lora_id}", "1:k")
        asks = [(key, lora) for key in texts for lora in (None, "one")]
        asked = [side.ask(**body(lora, extra_key=key)) for key, lora in asks]
        rids = await side.came(len(asks))
        keys = {(r.extra_key or "") + (r.lora_id or "") for r in side.waiting.values()}
        assert len(keys) == len(asks)
        await side.finish(*rids)
        await asyncio.gather(*asked)
        await settled()

    drive(scenario)


def test_the_abort_of_a_failed_batch_names_its_own_request_alone(drive):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError):
            await side.ask(**body(text=["a b", "a " * 2000], rid=["mine", "broken"]))
        assert [m.rid for m in side.sent if isinstance(m, AbortReq)] == ["mine"]
        await settled()

    drive(scenario)


def test_a_batch_that_fails_aborts_no_request_of_others_whose_id_begins_alike(drive):
    async def scenario(side: Side) -> None:
        other = side.ask(**body(rid="12"))
        await side.came(1)
        with pytest.raises(ValueError):
            await side.ask(**body(text=["a", "b", "c", "a " * 2000], rid=["1", "2", "22", "broken"]))
        await settled()
        assert sorted(side.waiting) == ["1", "12"]  # an abort of "1" would be one of "12"
        await side.finish("1", "12")
        await other

    drive(scenario)

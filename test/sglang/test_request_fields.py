"""A request that no scheduler can take is refused by its field before anything of it is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_harli.sglang_versions.current import arguments
from support.model_runner import NEWEST
from support.models import make_model
from support.tokenizer_side import Side, Sides

TOKENS = 509  # of the model's vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def drive(sglang_patches: None, model: str) -> Iterator[Callable[..., None]]:
    """``drive(scenario, **options)``: see ``Sides``."""
    sides = Sides(model)
    yield sides.drive
    sides.close()


PAIR = {"text": ["a", "b"]}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"lora_path": []}, "lora_path has 0 entries and the request has 1 prompt:"),
        ({"lora_path": ["one", "two"]}, "lora_path has 2 entries and the request has 1 prompt:"),
        ({"lora_path": [""]}, r"lora_path\[0\] is empty"),
        ({"lora_path": ["nobody"]}, "nobody"),
        ({**PAIR, "lora_path": ["one"]}, "lora_path has 1 entry and the request has 2 prompts:"),
        ({**PAIR, "lora_path": []}, "lora_path has 0 entries and the request has 2 prompts:"),
        ({**PAIR, "lora_path": ["one"] * 3}, "lora_path has 3 entries and the request has 2 prompts:"),
        ({**PAIR, "lora_path": ["one", ""]}, r"lora_path\[1\] is empty"),
        ({**PAIR, "lora_path": ["one"], "sampling_params": {"n": 2}}, "lora_path has 1 entry"),
        ({**PAIR, "sampling_params": [{}]}, "sampling_params has 1 entry"),
        ({**PAIR, "return_logprob": [True]}, "return_logprob has 1 entry"),
        ({**PAIR, "top_logprobs_num": [1, 1, 1]}, "top_logprobs_num has 3 entries"),
        ({**PAIR, "token_ids_logprob": [[1]], "return_logprob": True}, "token_ids_logprob has 1 entry"),
        ({**PAIR, "extra_key": ["k"]}, "extra_key has 1 entry"),
        ({"rid": ["a", "b"]}, "rid has 2 entries"),
        ({"text": "a \ud800"}, "text has half a surrogate pair at character 2: it is no text"),
        ({**PAIR, "lora_path": ["one", "\udfff"]}, "lora_path has half a surrogate pair at character 0"),
        *(
            ({"lora_id": guessed, "lora_path": path, **more}, "lora_id is the server's own")
            for guessed in ("guessed", ["guessed"])
            for path in (None, [None], "one", ["one"])
            for more in ({}, {"sampling_params": {"n": 2}})
        ),
        ({**PAIR, "lora_id": ["guessed", None], "lora_path": [None, None]}, "lora_id is the server's own"),
        ({"multi_item_delimiter_indices": [1]}, "multi_item_delimiter_indices is the server's own"),
        ({**PAIR, "multi_item_delimiter_indices": [["x"], [1]]}, "multi_item_delimiter_indices is the"),
        *(
            ({"token_indices_to_pool": places}, "token_indices_to_pool is the server's own")
            for places in ([1], [10**6], [[1], [2]])
            if NEWEST
        ),
        ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides cannot be given"),
        ({"text": None, "input_ids": [5, TOKENS]}, f"input_ids has {TOKENS}; accepted: 0 to {TOKENS - 1}"),
        ({"text": None, "input_ids": [-1, 5]}, "input_ids has -1"),
        ({"text": None, "input_ids": [[5], []]}, "the prompt has no tokens"),
        ({"return_logprob": True, "top_logprobs_num": TOKENS + 1}, "top_logprobs_num is 510"),
        ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len is -2"),
        ({"session_params": {"x": 5}}, "session_params has x; accepted: id, rid, offset"),
        ({"session_params": {"id": "s", "offset": "x"}}, "session_params.offset is 'x'"),
        ({"custom_labels": {"customer": "x"}}, "custom_labels has customer; accepted: none"),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_its_name(request_, message, drive):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError, match=message):
            await side.ask(**{"text": "a b", "lora_path": "one", **request_})
        await asyncio.sleep(0.01)

    drive(scenario, enable_metrics=True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 0}, "n is 0; accepted: whole numbers from 1 to 4096"),
        ({"n": -1}, "n is -1"),
        ({"n": 1.5}, "n is 1.5"),
        ({"n": "2"}, "n is '2'"),
        ({"n": None}, "n is None"),
        ({"n": 10**9}, "n is 1000000000"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": [0.5]}, r"top_p is \[0.5\]"),
        ({"sampling_seed": 2**63}, "sampling_seed (is|must be in)"),
        ({"sampling_seed": "x"}, "sampling_seed is 'x'"),
        ({"stream_interval": "x"}, "stream_interval is 'x'"),
        ({"logit_bias": {"3": "x"}}, "logit_bias is"),
        ({"logit_bias": {"3": 1e39}}, "logit_bias of token 3"),
        ({"logit_bias": {"3": float("nan")}}, "logit_bias of token 3"),
        ({"stop": [1]}, r"stop is \[1\]"),
        ({"json_schema": 5}, "json_schema is 5"),
        ({"stop_token_ids": [10**6], "min_new_tokens": 1}, "stop_token_ids has 1000000"),
        ({"is_normalized": True}, "is_normalized is not a sampling parameter"),
        ({"stop_strs": ["x"]}, "stop_strs is not a sampling parameter"),
        (
            {"max_tokens": 5},
            r"max_tokens is not a sampling parameter; those are (beam_width, )?custom_params,",
        ),
        ({"stop_token_ids": ["x"]}, "stop_token_ids is"),
        ({"skip_special_tokens": "x"}, "skip_special_tokens is 'x'"),
        ({"no_stop_trim": [1]}, r"no_stop_trim is \[1\]"),
        ({"stop_regex": "("}, r"stop_regex is '\('"),
        ({"stop_regex": ["a", "["]}, "stop_regex is"),
    ],
)
def test_a_sampling_parameter_that_does_not_fit_is_refused_by_its_name(params, message, drive):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError, match=message):
            await side.ask(text="a b", lora_path="one", sampling_params=params)
        await asyncio.sleep(0.01)

    drive(scenario)


@pytest.mark.parametrize(
    ("request_", "field", "sent"),
    [
        ({"lora_path": ["one"]}, "lora_id", "one"),
        ({"lora_path": [None]}, "lora_id", None),
        ({"extra_key": ["k"]}, "extra_key", "1:k"),
        ({"return_logprob": [True], "top_logprobs_num": [2]}, "top_logprobs_num", 2),
        ({"return_logprob": True, "logprob_start_len": [0]}, "logprob_start_len", 0),
        ({"rid": ["mine"]}, "rid", "mine"),
        ({"http_worker_ipc": "elsewhere"}, "http_worker_ipc", None),
        ({"return_logprob": True, "token_ids_logprob": [[3, 4]]}, "token_ids_logprob", [3, 4]),
    ],
)
def test_a_list_of_one_is_the_one_prompts_value(request_, field, sent, drive):
    async def scenario(side: Side) -> None:
        asked = side.ask(text="a b", **request_)
        (rid,) = await side.came(1)
        value = getattr(side.waiting[rid], field)
        assert value == (side.adapters[sent] if field == "lora_id" and sent else sent)
        side.drop(rid)
        await asked

    drive(scenario)


def test_numbers_keep_the_meaning_that_they_had(drive):
    async def scenario(side: Side) -> None:
        given = {
            "max_new_tokens": 4.0,
            "top_k": 2**40,
            "temperature": 1,
            "stop_token_ids": [10**6],
            "ignore_eos": 1,
            "logit_bias": {5: 1, "6": -1.5},
        }
        asked = side.ask(
            text="a b", sampling_params={**given, "custom_params": {"a": [[1]]}, "sampling_seed": None}
        )
        (rid,) = await side.came(1)
        params = side.waiting[rid].sampling_params
        assert params.max_new_tokens == 4 and type(params.max_new_tokens) is int
        assert params.logit_bias == {"5": 1.0, "6": -1.5}
        assert params.top_k == 2**30 and params.stop_token_ids == {10**6} and params.ignore_eos is True
        await side.finish(rid)
        await asked

    drive(scenario)


def test_one_id_is_made_for_each_prompt_however_many_answers(drive):
    for rid in (None, "mine", ["x", "y"]):
        request = GenerateReqInput(text=["a", "b"], rid=rid, sampling_params={"n": 3})
        request.normalize_batch_and_arguments()
        assert len(request.rid) == len(set(request.rid)) == 2
        assert len(request.text) == 6


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": "a", "lora_path": ["one", "two"]}, "lora_path has 2 entries and the request has 1 prompt:"),
        ({"input_ids": [1, 2], "lora_path": []}, "lora_path has 0 entries and the request has 1 prompt:"),
        ({"text": ["a", "b"], "lora_path": ["one"]}, "lora_path has 1 entry and the request has 2 prompts:"),
        ({"text": "a", "lora_id": "x"}, "lora_id is the server's own"),
        (
            {"text": "a", "multi_item_delimiter_indices": [0]},
            "multi_item_delimiter_indices is the server's own",
        ),
        ({"text": "a", "lora_id": "x", "lora_path": [None]}, "lora_id is the server's own"),
        ({"text": ["a"], "lora_id": ["x"], "lora_path": [None]}, "lora_id is the server's own"),
    ],
)
def test_an_embedding_request_is_checked_alike(request_, message, sglang_patches):
    with pytest.raises(ValueError, match=message):
        EmbeddingReqInput(**request_).normalize_batch_and_arguments()


@pytest.mark.parametrize("prompt", [{"text": "a"}, {"input_ids": [1, 2]}])
def test_an_embedding_of_one_prompt_takes_a_list_of_one(prompt, sglang_patches):
    request = EmbeddingReqInput(**prompt, lora_path=["one"])
    request.normalize_batch_and_arguments()
    assert request.lora_path == "one" and request.is_single


def test_an_embedding_on_a_model_that_makes_none_leaves_nothing(drive):
    async def scenario(side: Side) -> None:
        with pytest.raises(ValueError, match="embedding"):
            async for _ in side.generate_request(EmbeddingReqInput(text="a", lora_path=["one"]), None):
                pass

    drive(scenario)


def test_health_checks_pass(drive):
    async def scenario(side: Side) -> None:
        asked: Any = side.ask(
            input_ids=[0], rid="HEALTH_CHECK_x", sampling_params={"max_new_tokens": 1, "temperature": 0.0}
        )
        (rid,) = await side.came(1)
        await side.finish(rid)
        await asked

    drive(scenario)


@contextlib.contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """Other values of the arguments in force in this process."""
    before = {name: getattr(arguments.in_force(args), name) for name in values}

    def put(values: dict[str, Any]) -> None:
        if NEWEST:
            from sglang.srt.runtime_context import get_context

            get_context().override("test", **values)
        else:
            vars(args).update(values)

    put(values)
    yield
    put(before)


def test_scoring_says_where_the_items_end(drive, monkeypatch):
    from sglang.srt.managers import tokenizer_manager_score_mixin

    monkeypatch.setattr(tokenizer_manager_score_mixin, "MIS_DELIMITER_TOKEN_ID", 9)  # in this vocabulary

    async def scenario(side: Side) -> None:
        with overridden(side.server_args, enable_mis=True):
            asked = asyncio.create_task(
                side.score_request(query=[5], items=[[6], [7]], label_token_ids=[8], apply_softmax=False)
            )
            (rid,) = await side.came(1)
            assert side.waiting[rid].multi_item_delimiter_indices
            side.drop(rid)
            await asyncio.gather(asked, return_exceptions=True)  # what it makes of an abort is its own affair
            with pytest.raises(ValueError, match="the server's own"):
                await side.ask(text="a b", multi_item_delimiter_indices=[1])

    drive(scenario)

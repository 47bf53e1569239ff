"""The prompt that serving and training are compared on: what it is, when it is sent, and what is
done with the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sglang_harli.errors import NotReadyError, StateError
from sglang_harli.managers.http.start_up import parity_request
from sglang_harli.managers.http.start_up.parity_request import TOKENS, ParityRequest, prompt
from sglang_harli.managers.http.start_up.startup_profile import StartupProfile


class Tokenizer:
    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return 50


class Rig:
    """A scheduler that wants to be told, and SGLang's TokenizerManager, whose answers are made
    up."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.requests: list[Any] = []
        self.wanted = True
        self.answer: Any = None  # the meta_info
        self.takes_s = 0.0
        self.takes_back = True  # the scheduler has the request that is aborted
        self.manager = SimpleNamespace(
            server_status=ServerStatus.Up,
            tokenizer=Tokenizer(),
            context_len=4096,
            max_req_input_len=4000,
            is_pause=False,
            rid_to_state={},
            generate_request=self.generate,
            abort_request=self.abort,
        )
        self.publisher = SimpleNamespace(was_ready=True, down=None, ask=self.ask, pair=None)

    async def ask(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        assert method == "harli/parity"
        self.asked.append(body)
        if "served" in body:
            self.wanted = False
        return {"wanted": self.wanted, "version": 3, "vocab": 60, "positions": 512}

    def abort(self, name: str) -> None:
        self.requests.append(f"abort {name}")
        if self.takes_back:
            del self.manager.rid_to_state[name]

    async def generate(self, request: Any, _http: Any) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(request)
        self.manager.rid_to_state[request.rid] = object()
        if isinstance(self.answer, Exception):
            del self.manager.rid_to_state[request.rid]
            raise self.answer
        if self.answer == "never":
            await asyncio.sleep(3600)
        await asyncio.sleep(self.takes_s)
        values = [
            (None, request.input_ids[0], None),
            *((-1.5, token, None) for token in request.input_ids[1:]),
        ]
        del self.manager.rid_to_state[request.rid]
        yield {"meta_info": {"input_token_logprobs": values} if self.answer is None else self.answer}

    def run(self, seconds: float = 0.5, before: Any = None) -> None:
        async def whole() -> None:
            startup = StartupProfile(self.publisher, self.manager, 0.0)  # type: ignore[arg-type]
            request = ParityRequest(self.publisher, self.manager, startup)  # type: ignore[arg-type]
            request.start()
            if before is not None:
                await before(request)
            await asyncio.sleep(seconds)
            await request.stop()

        asyncio.run(whole())


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(parity_request, "LOOK_AGAIN_S", 0.05)
    return Rig()


def test_one_request_is_made_and_told(rig: Rig) -> None:
    rig.run()
    (request,) = rig.requests
    told = [body for body in rig.asked if body]
    assert told == [{"ids": request.input_ids, "served": [-1.5] * (TOKENS - 1), "version": 3}]
    assert len(request.input_ids) == TOKENS and all(3 <= token < 50 for token in request.input_ids)
    assert request.return_logprob and request.logprob_start_len == 0 and not request.log_metrics
    assert request.sampling_params == {"max_new_tokens": 0, "temperature": 0.0}
    assert request.extra_key and len(rig.asked) > 2  # it looks again now and then


def test_it_waits_for_a_moment_without_requests(rig: Rig) -> None:
    rig.manager.rid_to_state["theirs"] = object()

    async def let_go(_: ParityRequest) -> None:
        await asyncio.sleep(0.4)
        assert not rig.requests
        rig.manager.rid_to_state.clear()

    rig.run(0.5, let_go)
    assert len(rig.requests) == 1


def test_but_not_for_ever(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_request, "REST_S", 0.2)
    rig.manager.rid_to_state["theirs"] = object()
    rig.run()
    assert len(rig.requests) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ValueError("the input is too long"), "the input is too long"),
        (RuntimeError("no device"), "RuntimeError: no device"),
        (KeyError("finish"), "KeyError: 'finish'"),
        ({"input_token_logprobs": [(None, 4, None)]}, "0 log-probabilities of 64 tokens"),
        ({"finish_reason": {"type": "abort"}}, "0 log-probabilities of 64 tokens"),
    ],
)
def test_what_goes_wrong_is_told_and_tried_again(rig: Rig, answer: Any, said: str) -> None:
    rig.answer = answer
    rig.run()
    failed = [body["failed"] for body in rig.asked if body]
    assert len(failed) > 1 and all(said in text for text in failed)


def test_a_question_that_goes_wrong_is_asked_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, wrong = rig.publisher.ask, [RuntimeError("no socket"), StateError("no answer", code="internal")]

    async def first_wrong(method: str, body: dict[str, Any]) -> dict[str, Any]:
        if wrong:
            raise wrong.pop()
        return await ask(method, body)

    monkeypatch.setattr(rig.publisher, "ask", first_wrong)
    rig.run()
    assert not wrong and len([body for body in rig.asked if "served" in body]) == 1


@pytest.mark.parametrize("takes_back", [True, False])
def test_a_server_that_does_not_answer_gets_its_request_taken_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, takes_back: bool
) -> None:
    monkeypatch.setattr(parity_request, "ANSWER_S", 0.1)
    monkeypatch.setattr(parity_request, "TAKE_BACK_S", 0.05)
    rig.answer, rig.takes_back = "never", takes_back
    rig.run()
    assert any(
        isinstance(request, str) and request.startswith("abort harli-parity-") for request in rig.requests
    )
    assert any("did not answer its prompt" in body.get("failed", "") for body in rig.asked)
    assert not rig.manager.rid_to_state  # SGLang waits for them when it ends


def test_its_request_gives_way_to_what_wants_an_idle_server(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_request, "GIVE_WAY_S", 0.05)
    rig.answer = "never"

    async def flush(request: ParityRequest) -> None:
        await asyncio.sleep(0.2)
        assert rig.manager.rid_to_state
        async with request.quiet():
            assert not rig.manager.rid_to_state
            began = len(rig.requests)
            await asyncio.sleep(0.3)
            assert len(rig.requests) == began and not rig.manager.rid_to_state
        rig.answer = None

    rig.run(0.5, flush)
    told = [body for body in rig.asked if body]
    assert len(told) == 1 and "served" in told[0]  # it was no failure


def test_a_request_that_is_about_to_be_answered_is_waited_for(rig: Rig) -> None:
    rig.takes_s = 0.15

    async def flush(request: ParityRequest) -> None:
        await asyncio.sleep(0.05)
        assert rig.manager.rid_to_state
        async with request.quiet():
            assert not rig.manager.rid_to_state

    rig.run(0.5, flush)
    assert len(rig.requests) == 1 and [body for body in rig.asked if "served" in body]


def test_a_release_while_it_waits_for_a_moment_has_it_ask_anew(rig: Rig) -> None:
    rig.manager.rid_to_state["theirs"] = object()

    async def release(request: ParityRequest) -> None:
        await asyncio.sleep(0.2)
        async with request.quiet():
            rig.wanted = False
        rig.manager.rid_to_state.clear()

    rig.run(0.5, release)
    assert not rig.requests


def test_nothing_is_asked_while_generation_is_paused(rig: Rig) -> None:
    rig.manager.is_pause = True

    async def resume(_: ParityRequest) -> None:
        await asyncio.sleep(0.3)
        assert not rig.requests and not rig.asked
        rig.manager.is_pause = False

    rig.run(0.5, resume)
    assert len(rig.requests) == 1


@pytest.mark.parametrize(("field", "value"), [("context_len", 20), ("max_req_input_len", 20)])
def test_the_prompt_is_no_longer_than_the_server_takes(rig: Rig, field: str, value: int) -> None:
    setattr(rig.manager, field, value)
    rig.run()
    assert len(rig.requests[0].input_ids) == 19


def test_without_a_tokenizer_every_id_of_the_model_may_be_in_the_prompt(rig: Rig) -> None:
    rig.manager.tokenizer = None
    rig.run()
    assert max(rig.requests[0].input_ids) >= 50 and len(rig.requests[0].input_ids) == TOKENS


def test_the_prompt_is_always_the_same_and_has_no_special_tokens() -> None:
    assert prompt(64, 151_936, set()) == prompt(64, 151_936, set())
    assert len(set(prompt(64, 151_936, set()))) > 60
    assert set(prompt(64, 5, {0, 1, 2})) == {3, 4}
    for length, special in ((1, set()), (64, set(range(5)))):
        with pytest.raises(NotReadyError, match="has no log-probabilities"):
            prompt(length, 5, special)

"""The patches of SGLang's serving without LoRA: what one request can do to all others."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import tokenizer_manager

from sglang_harli.patches import shutdown_drain
from support.models import make_model
from support.tokenizer_side import Side, Sides


class Looked(Exception):
    """An idle turn of the scheduler's loop has got as far as looking whether it is idle."""


def test_health_checks_that_no_batch_will_answer_are_answered_when_idle(sglang_patches):
    """By the patch on 0.5.16; 0.5.23 does so itself, one in each turn."""
    from sglang.srt.managers.scheduler import Scheduler

    def look() -> bool:
        raise Looked

    said = []
    scheduler = SimpleNamespace(
        return_health_check_ipcs=deque([None, None]),
        ipc_channels=SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=said.append)),
        is_fully_idle=look,
        rust_server=None,
        scheduler_stage_metrics=None,
        dp_attn_adapter=SimpleNamespace(drop_sync_wait_carry=lambda: None),
    )
    scheduler.maybe_send_health_check_signal = lambda: Scheduler.maybe_send_health_check_signal(scheduler)
    for _ in range(2):
        with pytest.raises(Looked):
            Scheduler.on_idle(scheduler)
    assert [type(message).__name__ for message in said] == ["HealthCheckOutput"] * 2


def test_probabilities_that_are_no_numbers_spoil_their_row_alone(sglang_patches, caplog, monkeypatch):
    import torch
    from sglang.srt.layers import sampler

    probs = torch.tensor([[0.0, 1.0, 0.0], [float("nan")] * 3, [0.0, 0.0, float("inf")], [0.0] * 3])
    assert sampler.sampling_from_probs_torch(probs).tolist()[0] == 1
    caplog.clear()
    monkeypatch.setenv("SGLANG_OPT_USE_GUMBEL_SAMPLE", "0")  # with it 0.5.23 draws in a way of its own
    assert sampler.sampling_from_probs_torch(probs).tolist()[0] == 1
    count = torch.full((4,), 2, dtype=torch.int32)
    every, none = torch.ones(4), torch.zeros(4)
    tokens = sampler.top_k_top_p_min_p_sampling_from_probs_torch(probs, count, every, none, False, None, None)
    assert tokens.tolist()[0] == 1 and len(tokens) == 4
    assert caplog.text.count("the probabilities of 3 requests are no numbers") == 2
    with pytest.raises(RuntimeError):  # what is not of the numbers is nobody's to mend
        sampler.sampling_from_probs_torch(torch.ones(2, 2, 2))


def test_a_repetition_penalty_starts_no_compiler_on_a_cpu(sglang_patches):
    import torch
    from sglang.srt.sampling.penaltylib import repetition_penalty
    from torch._dynamo.utils import counters

    counters.clear()
    logits = torch.tensor([[2.0, -2.0, 4.0]])
    repetition_penalty.apply_scaling_penalties(logits, torch.tensor([[2.0, 2.0, 1.0]]))
    assert logits.tolist() == [[1.0, -4.0, 4.0]]
    assert not counters["frames"]


def test_the_mask_of_a_grammar_is_applied_on_a_cpu(sglang_patches):
    import torch
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend

    mask = torch.tensor([[0b101], [-1]], dtype=torch.int32)
    for apply in (
        XGrammarGrammarBackend.apply_vocab_mask,
        lambda *a: XGrammarGrammar.apply_vocab_mask(None, *a),
    ):
        logits = torch.ones(2, 20)
        apply(logits, mask)
        assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [0, 2]
        assert torch.isfinite(logits[1]).all()


def session_and_ask() -> tuple[Any, Any]:
    """SGLang's session, and a call that has it make a request of which the scheduler says at once
    that it ended."""
    import msgspec
    from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.session.session_controller import Session

    session = Session(1000, "s")
    unset = {field.name: None for field in msgspec.structs.fields(TokenizedGenerateReqInput)}

    def ask(own_rid: str, **params: Any) -> Any:
        given = {"rid": own_rid, "input_ids": array("q", [5, 6]), "sampling_params": SamplingParams()}
        given["return_hidden_states"] = False
        request = SimpleNamespace(**{**unset, **given, "session_params": SessionParams(id="s", **params)})
        made = session.create_req(request, None, 100)
        made.finished_reason = "ended"
        return made

    return session, ask


def test_all_requests_of_a_session_can_be_replaced(sglang_patches):
    session, ask = session_and_ask()
    for own_rid in ("a", "b", "a"):  # an id may come again
        ask(own_rid)
    ask("c", rid="b")
    ask("d", replace=True)
    assert list(session.req_nodes) == ["d"]


@pytest.mark.parametrize("first", [{}, {"rid": "0"}])
def test_a_long_conversation_can_be_replaced(first, sglang_patches):
    session, ask = session_and_ask()
    turns = [ask("0")] + [ask(str(turn), rid=str(turn - 1)) for turn in range(1, 1500)]
    turns[-1].finished_reason = None  # this one still runs
    ask("new", replace=True, **first)
    assert list(session.req_nodes) == [*(["0"] if first else []), "new"]
    assert turns[-1].to_finish is not None and turns[-2].to_finish is None


def test_what_is_replaced_takes_no_later_request_of_the_same_id_with_it(sglang_patches):
    session, ask = session_and_ask()
    ask("a")
    ask("b", rid="a")
    ask("b")  # another one
    ask("c", replace=True, rid="a")
    assert list(session.req_nodes) == ["a", "b", "c"]


class Killed(Exception):
    """The server has got as far as ending its processes."""


def test_a_server_that_ends_does_not_wait_for_an_answer_that_never_comes(
    sglang_patches, tmp_path, monkeypatch
):
    """In SGLang's own loop, which looks every five seconds until no request is left."""

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setattr(tokenizer_manager, "kill_process_tree", kill)
    monkeypatch.setattr(shutdown_drain, "LOOK_S", 0.05)
    monkeypatch.setattr(shutdown_drain, "QUIET_S", 0.3)

    async def scenario(side: Side) -> None:
        asked = side.ask(text="a b", sampling_params={"temperature": 0, "max_new_tokens": 4})
        (rid,) = await side.came(1)
        side.gracefully_exit = True
        with pytest.raises(Killed):
            await asyncio.wait_for(side.sigterm_watchdog(), 15)
        assert not asked.done()
        asked.cancel()  # in a server it ends with it
        await side.finish(rid)

    sides = Sides(make_model(tmp_path / "tiny"))
    sides.drive(scenario)
    sides.close()

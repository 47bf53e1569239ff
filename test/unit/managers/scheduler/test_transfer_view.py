"""What is read of a decode server's scheduler: who waits for what, and what SGLang reserves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_harli.config import HarliOptions
from sglang_harli.core import Reason
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.transfer_view import TransferView, reserved_slots, view_of


def req(prompt: int = 10, emitted: int = 1, first_s: float = 2.0) -> Any:
    class Req(SimpleNamespace):
        __hash__ = object.__hash__

    return Req(
        rid="r",
        origin_input_ids=[1] * prompt,
        output_ids=[1] * emitted,
        time_stats=SimpleNamespace(
            prefill_finished_time=0.0,
            decode_prebuilt_finish_time=first_s,
            last_prefill_finished_time=0.0,
            last_decode_finish_time=first_s,
        ),
        lora_id=None,
        finished=lambda: False,
    )


def view(
    *,
    asking: int = 0,
    retracted: int = 0,
    coming: int = 0,
    waiting: int = 0,
    running: list[Any] | None = None,
) -> TransferView:
    reqs = running or []
    scheduler = SimpleNamespace(
        waiting_queue=[req() for _ in range(waiting)],
        running_batch=SimpleNamespace(reqs=reqs, batch_is_full=False, is_empty=lambda: not reqs),
        chunked_req=None,
        disagg_decode_prealloc_queue=SimpleNamespace(
            queue=[SimpleNamespace(req=req(20, 0)) for _ in range(asking)],
            retracted_queue=[req(20, 6) for _ in range(retracted)],
            num_reserved_decode_tokens=512,
        ),
        disagg_decode_transfer_queue=SimpleNamespace(
            queue=[SimpleNamespace(req=req()) for _ in range(coming)]
        ),
        ipc_channels=SimpleNamespace(recv_from_tokenizer=zmq.Context.instance().socket(zmq.PULL)),
    )
    found = view_of(scheduler, ServingState(HarliOptions(ttft_slo_ms=500.0), prefills=False))
    assert isinstance(found, TransferView)
    return found


def test_a_server_that_computes_prompts_has_the_other_view():
    side = ServingState(HarliOptions())
    assert type(view_of(SimpleNamespace(), side)) is not TransferView and side.pair is None


def test_requests_in_transfer_are_no_prompts_that_wait():
    """Their prefill server has them: training uses the time."""
    found = view(asking=2, coming=3, waiting=4)
    assert found.waiting() == 0 and not found.between_prefills()
    assert found.transferring == 5 and not found.idle
    assert view().idle and view().transferring == 0


def test_behind_a_batch_only_the_running_requests_count():
    running = [req(first_s=1.0), req(first_s=2.0)]
    found = view(waiting=3, asking=2, running=running)
    boundary = found.behind(SimpleNamespace(reqs=running), decoded=True)
    assert boundary.backlog is None and boundary.running == 2 and not boundary.unclocked
    load = boundary.load()
    assert (load.running, load.waiting, load.promised, load.unclocked) == (2, 0, 0, 0)


def test_one_whose_first_token_is_not_known_stops_training():
    running = [req(first_s=1.0), req(first_s=0.0)]
    load = view(running=running).behind(SimpleNamespace(reqs=running), decoded=True).load()
    assert (load.running, load.unclocked) == (2, 1)
    alone = view(running=running[1:]).behind(SimpleNamespace(reqs=running[1:]), decoded=True)
    assert not alone.load().idle
    slack = alone.slack(3.0, 0.0, disturbed=False)
    offer: Any = SimpleNamespace(candidates=((1, 0.001),))
    decision = qos_policy.decide(alone.load(), slack, offer, alone.targets)
    assert (decision.quanta, decision.reason) == (0, Reason.NO_CLOCK)


def test_room_is_made_for_all_that_a_request_takes_when_it_is_admitted():
    assert view(asking=2).prefill_slots() == 40
    assert view(asking=1, retracted=1).prefill_slots() == 20 + 25
    assert view(asking=99).prefill_slots() == 32 * 20
    assert view(coming=3, waiting=3).prefill_slots() == 0  # they have their slots


@pytest.mark.parametrize(("coming", "waiting", "running", "slots"), [(0, 0, 0, 0), (1, 2, 3, 6 * 512)])
def test_what_is_reserved_for_decoding(coming, waiting, running, slots):
    found = view(coming=coming, waiting=waiting, running=[req() for _ in range(running)])
    assert reserved_slots(found._scheduler) == slots
    shown = found._side.status()["disaggregation"]
    assert shown == {
        "mode": "decode",
        "waiting_for_slots": 0,
        "transferring": coming,
        "reserved_slots": slots,
    }


def test_before_sglang_has_its_queues_nothing_is_reserved():
    assert reserved_slots(SimpleNamespace()) == 0

"""What is read of SGLang's scheduler before a decision: who waits, what the next prefill takes,
whose deadline is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_harli.config import HarliOptions
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.serving_view import LOOK_AHEAD, ServingView
from sglang_harli.sglang_versions import supported


class Req(SimpleNamespace):
    """Hashable, as SGLang's."""

    __hash__ = object.__hash__


def req(prompt: int = 10, *, emitted: int = 0, cached: int = 0, done: bool = False, most: int = 50) -> Any:
    return Req(
        origin_input_ids=[1] * prompt,
        output_ids=[1] * emitted,
        prefix_indices=[1] * cached,
        extend_range=SimpleNamespace(start=0, end=4),
        prefix_len=cached,
        extend_end=4,
        sampling_params=SimpleNamespace(max_new_tokens=most),
        time_stats=SimpleNamespace(
            scheduler_recv_time=1.0,
            prefill_finished_time=2.0 if emitted else 0.0,
            last_prefill_finished_time=0.0,
            last_decode_finish_time=0.0,
        ),
        lora_id=None,
        finished=lambda: done,
    )


def view(
    *, waiting: list[Any], running: list[Any], full: bool = False, ttft_ms: float | None = 500.0, **other: Any
) -> ServingView:
    context = zmq.Context.instance()
    scheduler = SimpleNamespace(
        waiting_queue=waiting,
        running_batch=SimpleNamespace(reqs=running, batch_is_full=full, is_empty=lambda: not running),
        chunked_req=None,
        chunked_prefill_size=None,
        max_prefill_tokens=64,
        enable_overlap=False,
        get_num_allocatable_reqs=lambda count: 0,
        prefill_decode_interval=0,
        _prefill_decode_interval_remaining=0,
        ipc_channels=SimpleNamespace(recv_from_tokenizer=context.socket(zmq.PULL)),
    )
    vars(scheduler).update(other)
    return ServingView(scheduler, ServingState(HarliOptions(ttft_slo_ms=ttft_ms)))


def test_who_waits():
    found = view(waiting=[req(), req()], running=[], chunked_req=req())
    assert (found.waiting(), found.prompts, found.idle) == (3, 2, False)
    assert [*found.prompts_from(1)] == found._scheduler.waiting_queue[1:]
    assert view(waiting=[], running=[]).idle


def test_the_next_prefill_takes_what_is_not_cached_up_to_one_batch_of_prompts():
    assert view(waiting=[req(20, cached=5), req(10)], running=[]).prefill_slots() == 25
    assert view(waiting=[req(20)] * 9, running=[]).prefill_slots() == 64
    assert view(waiting=[req(1)] * 99, running=[]).prefill_slots() == LOOK_AHEAD
    assert view(waiting=[req(20)], running=[req()], full=True).prefill_slots() == 0


def test_time_between_two_prefills_is_used_under_a_ttft_target_only():
    assert view(waiting=[req()], running=[]).between_prefills()
    assert not view(waiting=[req()], running=[], ttft_ms=None).between_prefills()
    assert not view(waiting=[req()], running=[req()], full=True).between_prefills()
    assert view(waiting=[], running=[req()], full=True, chunked_req=req()).between_prefills()


@pytest.mark.parametrize("decoded", [True, False])
def test_the_boundary_counts_each_request_once(decoded: bool):
    first, second, over = req(10, emitted=3), req(20, emitted=1), req(5, emitted=9, done=True)
    running = [first, second, over]
    batch = SimpleNamespace(reqs=running if decoded else [second])
    found = view(waiting=[], running=running).behind(batch, decoded=decoded)
    assert (found.running, found.context_tokens, found.backlog) == (2, 13 + 21, None)
    assert found.load().waiting == 0 and not found.adapters


def test_a_prompt_that_waits_for_a_seat_has_a_deadline_and_others_stop_training():
    running = [req(10, emitted=3, most=5), req(10, emitted=3, most=9)]
    batch = SimpleNamespace(reqs=running)
    seated = view(waiting=[req(30)], running=running, full=True).behind(batch, decoded=True)
    assert seated.backlog is not None and not seated.backlog.admitted
    assert (seated.load().promised, seated.load().waiting) == (1, 0)
    for changed in ({"full": False}, {"get_num_allocatable_reqs": lambda count: 1}, {"ttft_ms": None}):
        options: dict[str, Any] = {"full": True, **changed}
        stopped = view(waiting=[req(30)], running=running, **options).behind(batch, decoded=True)
        assert stopped.backlog is None and stopped.load().waiting == 1
    between = view(waiting=[req(30)], running=[]).behind(
        SimpleNamespace(reqs=[req(8, emitted=1)]), decoded=False
    )
    assert between.backlog is not None and between.backlog.admitted


# ------------------------------------------------------------------ decode rounds between prefills
newest = pytest.mark.skipif(supported.folder() != "newest", reason="SGLang 0.5.16 always prefills first")
ROUNDS: dict[str, Any] = {"prefill_decode_interval": 5, "_prefill_decode_interval_remaining": 3}


@newest
def test_a_prompt_that_waits_out_decode_rounds_has_a_deadline_that_counts_them():
    running = [req(10, emitted=3), req(10, emitted=3)]
    batch = SimpleNamespace(reqs=running)
    held = view(waiting=[req(30)], running=running, **ROUNDS).behind(batch, decoded=True)
    plain = view(waiting=[req(30)], running=running).behind(batch, decoded=True)
    assert plain.backlog is None and plain.load().waiting == 1  # what keeps it is not known
    assert held.backlog is not None and not held.backlog.admitted
    assert (held.load().promised, held.load().waiting) == (1, 0)
    step_s = held.side.predictor.decode(2, 26 + 3 * 2, after_training=True).upper_s
    assert held.backlog.rounds_s == pytest.approx(3 * step_s)


@newest
def test_the_rounds_come_behind_a_prefill_too_and_between_its_chunks():
    batch = SimpleNamespace(reqs=[req(8, emitted=1)])
    found = view(waiting=[req(200)], running=[], **ROUNDS).behind(batch, decoded=False)  # 4 chunks of 64
    assert found.backlog is not None and not found.backlog.admitted
    rounds = 3 + 3 * 5
    step_s = found.side.predictor.decode(1, 9 + rounds, after_training=True).upper_s
    assert found.backlog.rounds_s == pytest.approx(rounds * step_s)


@newest
def test_prompts_that_take_places_one_by_one_are_as_many_rounds_apart():
    running = [req(10, emitted=3, most=5), req(10, emitted=3, most=6)]  # 2 and 3 steps to go
    batch = SimpleNamespace(reqs=running)
    waiting = [req(30), req(30)]
    near = view(waiting=waiting, running=running, full=True).behind(batch, decoded=True)
    far = view(waiting=waiting, running=running, full=True, **ROUNDS).behind(batch, decoded=True)
    assert near.backlog is not None and far.backlog is not None

    def wait_s(found: Any, steps: int) -> float:
        return steps * found.side.predictor.decode(2, 26 + steps * 2, after_training=True).upper_s

    assert near.backlog.since_s == pytest.approx(1.0 - wait_s(near, 3))
    assert far.backlog.since_s == pytest.approx(1.0 - wait_s(far, 3 + 5))


@newest
def test_a_chunked_prompt_that_waits_out_its_rounds_goes_on_and_full_places_behind_it_stop_training():
    running = [req(10, emitted=3)]
    batch = SimpleNamespace(reqs=running)
    alone = view(waiting=[], running=running, chunked_req=req(90), **ROUNDS).behind(batch, decoded=True)
    assert alone.backlog is not None and alone.load().promised == 1
    behind = view(waiting=[req(9)], running=running, full=True, chunked_req=req(90), **ROUNDS)
    assert behind.behind(batch, decoded=True).backlog is None

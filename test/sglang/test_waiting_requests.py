"""How far a request's prompt is computed, and which rounds come before the next prefill: read from
SGLang's own Req and Scheduler, while its own code takes a prompt in chunks."""

from __future__ import annotations

import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.sglang_versions.current import decode_rounds, requests
from support.model_runner import NEWEST, publish, server_args

PROMPT, CHUNK = 100, 40


@pytest.fixture
def runner(sglang_runner: Callable[..., Any], tiny_model: Callable[..., str]) -> Any:
    runner = sglang_runner(tiny_model())
    publish(runner.server_args)
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    return runner


@pytest.fixture
def tree(runner: Any) -> Any:
    """SGLang's prefix cache, which a chunk that is done goes to."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    more: dict[str, Any] = {}
    if NEWEST:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        kind: Any = UnifiedRadixCache
        more = {"tree_components": (ComponentType.FULL,)}
    else:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        kind = RadixCache
    return kind(
        CacheInitParams(
            disable=False,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            page_size=1,
            **more,
        )
    )


def request() -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_new_tokens=4)
    made = Req(
        rid="r",
        origin_input_text="",
        origin_input_ids=array.array("q", range(PROMPT)),
        sampling_params=params,
    )
    made.logprob_start_len = -1
    return made


def adder_of(runner: Any, tree: Any) -> Any:
    from sglang.srt.managers.schedule_policy import PrefillAdder

    return PrefillAdder(
        1,
        tree,
        runner.token_to_kv_pool_allocator,
        None,  # nothing runs
        1.0,
        4096,
        CHUNK,
    )


def compute(runner: Any, tree: Any, reqs: list[Any], chunked: Any) -> None:
    """As the scheduler prepares a prefill: slots for this chunk."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    batch = ScheduleBatch.init_new(
        reqs,
        runner.req_to_token_pool,
        runner.token_to_kv_pool_allocator,
        tree,
        runner.model_config,
        False,
        SpeculativeAlgorithm.NONE,
        chunked_req=chunked,
    )
    batch.prepare_for_extend()


def stash(req: Any, tree: Any) -> None:
    """As the scheduler does before it looks for the next batch."""
    if NEWEST:
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(req, tree)
    else:
        from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

        maybe_cache_unfinished_req(req, tree, chunked=True)


def test_a_prompt_in_chunks_is_as_far_as_its_chunks_are(runner: Any, tree: Any) -> None:
    req = request()
    assert requests.cached(req) == 0
    req.init_next_round_input(tree)
    adder = adder_of(runner, tree)
    adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
    chunked = adder.new_chunked_req
    assert chunked is req
    compute(runner, tree, adder.can_run_list, chunked)
    assert requests.prefilled(req) == CHUNK  # it is launched
    for done in (CHUNK, 2 * CHUNK):
        stash(req, tree)
        req.init_next_round_input()
        adder = adder_of(runner, tree)
        left = adder.add_chunked_req(req)
        assert (left is req) == (done + CHUNK < PROMPT)
        compute(runner, tree, adder.can_run_list, left)
        assert requests.prefilled(req) == min(done + CHUNK, PROMPT)


def test_what_the_tree_holds_of_a_prompt_that_waits_is_cached(runner: Any, tree: Any) -> None:
    first = request()
    first.init_next_round_input(tree)
    adder = adder_of(runner, tree)
    adder.add_one_req(first, has_chunked_req=False, truncation_align_size=None)
    compute(runner, tree, adder.can_run_list, adder.new_chunked_req)
    stash(first, tree)
    second = request()
    second.init_next_round_input(tree)
    assert requests.cached(second) == CHUNK


@pytest.mark.skipif(not NEWEST, reason="SGLang 0.5.16 always prefills first")
def test_the_rounds_that_are_left_are_those_that_sglang_makes_a_prefill_wait() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    scheduler = SimpleNamespace(
        prefill_decode_interval=3,
        _prefill_decode_interval_remaining=0,
        prefill_decode_interval_min_bs=2,
        require_mlp_sync=False,
    )
    prefill = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: True))
    running = SimpleNamespace(batch_size=lambda: 2)
    assert (decode_rounds.left(scheduler), decode_rounds.between(scheduler)) == (0, 3)
    Scheduler._arm_prefill_decode_interval(scheduler, prefill)  # type: ignore[arg-type]
    waited = 0
    for left in (3, 2, 1, 0):
        assert decode_rounds.left(scheduler) == left
        waited += Scheduler._should_defer_prefill(scheduler, running)  # type: ignore[arg-type]
    assert waited == 3
    Scheduler._arm_prefill_decode_interval(scheduler, prefill)  # type: ignore[arg-type]
    few = SimpleNamespace(batch_size=lambda: 1)
    assert not Scheduler._should_defer_prefill(scheduler, few)  # type: ignore[arg-type]
    assert decode_rounds.left(scheduler) == 0


def test_sglang_stops_at_the_rounds_of_its_arguments(runner: Any) -> None:
    """What the scheduler keeps is the value in force, which may be another than was given."""
    from sglang.srt.managers.scheduler import Scheduler

    args = server_args(runner.server_args.model_path)
    if NEWEST:
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(args, "another decision", prefill_decode_interval=3)
        assert args.prefill_decode_interval != 3  # what was given
    publish(args)
    scheduler = SimpleNamespace(server_args=args, model_config=runner.model_config, is_mixed_chunk=False)
    Scheduler.init_chunked_prefill(scheduler)  # type: ignore[arg-type]
    assert (decode_rounds.left(scheduler), decode_rounds.between(scheduler)) == (0, 3 if NEWEST else 0)

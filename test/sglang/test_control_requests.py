"""Calls of an operator that come at a wrong moment, or with content that cannot be read: the
scheduler's own handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from support.model_runner import NEWEST

TAGS = ("kv_cache", "weights", "cuda_graph")


class Scheduler:
    """SGLang's handlers around a worker that notes what reaches it.

    Attributes:
        idle: whether no request runs.
        waiting: whether one waits, without KV.
        done: what was released, brought back or updated, in order.
        broken: what an update raises.
    """

    def __init__(self) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode
        from sglang.srt.managers.scheduler_components import weight_updater

        self.idle, self.done, self.broken = True, [], None
        self.waiting = False
        saver = SimpleNamespace(
            pause=lambda tag: self.done.append(f"-{tag}"), resume=lambda tag: self.done.append(f"+{tag}")
        )
        self.scheduler = SimpleNamespace(
            _engine_paused=False,
            disaggregation_mode=DisaggregationMode.NULL,
            record_weight_version_change=lambda new_version: None,
        )
        self.updater = weight_updater.SchedulerWeightUpdaterManager(
            tp_worker=self._worker(),
            draft_worker=None,
            memory_saver_adapter=saver,
            flush_cache=lambda **_: self.idle,
            is_fully_idle=self._is_idle,
            **({"scheduler": self.scheduler} if NEWEST else {"tp_cpu_group": None}),
        )
        if NEWEST:
            self.updater._session = weight_updater._WeightUpdateSession(selector="all")

    def _is_idle(self, ignore_waiting: bool = False) -> bool:
        return self.idle and (ignore_waiting or not self.waiting)

    def _worker(self) -> Any:
        if not NEWEST:
            return SimpleNamespace(
                update_weights_from_disk=self._update, update_weights_from_tensor=self._update
            )
        updates = SimpleNamespace(update_weights_from_disk=self._update)
        runners = [("target", SimpleNamespace(weight_updater=updates))]
        return SimpleNamespace(weight_update_runners=lambda: runners, deserialize_own_rank=self._update)

    def _update(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        if self.broken is not None:
            raise self.broken
        self.done.append("updated")
        return True, "ok"


@pytest.fixture
def scheduler(sglang_patches: None, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    if NEWEST:  # it asks for the group itself
        from sglang.srt.managers.scheduler_components import weight_updater

        alone = SimpleNamespace(tp_group=SimpleNamespace(cpu_group=None))
        monkeypatch.setattr(weight_updater, "get_parallel", lambda: alone)
    return Scheduler()


@pytest.fixture
def memory(scheduler: Scheduler) -> Callable[..., str]:
    """``memory("release", tags)``: the refusal that the HTTP route answers with 400, "" where there
    is none."""
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.communicator import FanOutCommunicator

    def call(what: str, *tags: str) -> str:
        kind = {"release": io_struct.ReleaseMemoryOccupationReqInput}.get(
            what, io_struct.ResumeMemoryOccupationReqInput
        )
        handler = getattr(scheduler.updater, f"{what}_memory_occupation")

        async def through_the_channel() -> None:
            loop = asyncio.get_running_loop()

            def send(request: Any) -> None:
                loop.call_soon(lambda: channel.handle_recv(handler(request)))

            channel: FanOutCommunicator[Any] = FanOutCommunicator(send, 1)
            await channel(kind(tags=list(tags) or None))

        try:
            asyncio.run(through_the_channel())
        except ValueError as error:
            return str(error)
        return ""

    return call


def test_memory_that_was_not_released_is_there(scheduler, memory):
    assert memory("resume") == memory("resume", "kv_cache") == ""
    assert memory("release", "kv_cache") == memory("release", "kv_cache") == ""
    assert memory("resume") == memory("resume", "kv_cache", "kv_cache") == ""
    assert scheduler.done == ["-kv_cache", "+kv_cache"]
    assert scheduler.updater.offload_tags == set()


def test_the_rest_is_released_and_comes_back(scheduler, memory):
    assert memory("release", "kv_cache") == memory("release", "cuda_graph", "kv_cache") == ""
    assert scheduler.updater.offload_tags == {"kv_cache", "cuda_graph"}
    assert memory("resume", "cuda_graph") == memory("resume") == ""
    assert scheduler.done == ["-kv_cache", "-cuda_graph", "+cuda_graph", "+kv_cache"]


@pytest.mark.parametrize("what", ["release", "resume"])
def test_an_unknown_kind_of_memory_is_named(scheduler, memory, what):
    assert memory(what, "kv_cache", "zzz") == f"tags has zzz; accepted: {', '.join(TAGS)}"
    assert scheduler.done == [] and scheduler.updater.offload_tags == set()


def test_memory_is_not_released_under_a_request(scheduler, memory):
    scheduler.idle = False
    assert memory("release").startswith("memory was not released: requests are running or waiting")
    assert scheduler.done == [] and scheduler.updater.offload_tags == set()
    scheduler.idle = True
    assert memory("release", "kv_cache") == ""


@pytest.mark.skipif(not NEWEST, reason="0.5.16 frees nothing under a request that waits")
def test_memory_is_released_under_requests_that_wait_while_it_is_paused(scheduler, memory):
    scheduler.waiting = True
    assert memory("release", "kv_cache").startswith("memory was not released: requests are running")
    scheduler.scheduler._engine_paused = True
    assert memory("release", "kv_cache") == ""


def test_a_release_that_fails_half_way_is_an_error(scheduler, memory):
    def fail() -> bool:
        raise RuntimeError("the cache could not be flushed")

    flush, scheduler.updater.flush_cache = scheduler.updater.flush_cache, fail
    failed = "the release failed: RuntimeError: the cache could not be flushed"
    assert memory("release", "kv_cache", "cuda_graph") == failed
    assert scheduler.updater.offload_tags == {"kv_cache"}, "the graphs are there"
    scheduler.updater.flush_cache = flush
    assert memory("resume") == "" and scheduler.done == ["-kv_cache", "+kv_cache"]
    assert scheduler.updater.offload_tags == set()


def test_a_return_that_fails_half_way_is_an_error(scheduler, memory):
    def fail(tag: str) -> None:
        raise RuntimeError("the memory is gone")

    assert memory("release", "kv_cache", "cuda_graph") == ""
    saver = scheduler.updater.memory_saver_adapter
    resume = saver.resume
    saver.resume = lambda tag: fail(tag) if tag == "kv_cache" else resume(tag)
    for _ in range(2):  # the graphs come first, and are not brought back twice
        assert memory("resume") == "the return failed: RuntimeError: the memory is gone"
        assert scheduler.updater.offload_tags == {"kv_cache"}
    saver.resume = resume
    assert memory("resume") == "" and scheduler.updater.offload_tags == set()
    assert scheduler.done == ["-kv_cache", "-cuda_graph", "+cuda_graph", "+kv_cache"]


def test_a_return_without_its_content_is_no_answer(scheduler, monkeypatch):
    """The weights are mapped and are not those that were served: the scheduler ends."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput
    from sglang.srt.managers.scheduler_components import weight_updater

    def fail(*_: Any) -> None:
        raise RuntimeError("no weights were kept")

    monkeypatch.setattr(weight_updater.torch.distributed, "barrier", lambda *_, **__: None)
    monkeypatch.setattr(weight_updater, "_import_static_state", fail)
    if NEWEST:
        monkeypatch.setattr(weight_updater, "get_model", lambda: SimpleNamespace(weight_cache_mode="off"))
    scheduler.updater.tp_worker.model_runner = SimpleNamespace(model=None)
    scheduler.updater.offload_tags.add("weights")
    with pytest.raises(RuntimeError, match="no weights were kept"):
        scheduler.updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=["weights"]))
    assert scheduler.done == ["+weights"]


@pytest.mark.skipif(not NEWEST, reason="0.5.16 has no sessions")
def test_the_end_of_a_session_that_fails_is_an_error_and_the_session_stays_open(scheduler):
    from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

    answer = scheduler.updater.end_weight_update(EndWeightUpdateReqInput())
    assert not answer.success and answer.message.startswith("the update failed: AttributeError")
    assert scheduler.updater._session is not None


@pytest.mark.skipif(not NEWEST, reason="0.5.16 has no such cache")
def test_weights_that_another_process_shares_are_refused_before_anything_is_released(
    scheduler, memory, monkeypatch
):
    from sglang.srt.managers.scheduler_components import weight_updater

    shared = SimpleNamespace(weight_cache_mode="client")
    monkeypatch.setattr(weight_updater, "get_model", lambda: shared)
    assert "--weight-cache-mode client" in memory("release")
    assert "--weight-cache-mode client" in memory("release", "kv_cache", "weights")
    assert scheduler.done == [] and scheduler.updater.offload_tags == set()
    assert memory("release", "kv_cache") == "" and scheduler.done == ["-kv_cache"]


def test_weights_are_not_updated_under_a_request_that_holds_the_cache(scheduler):
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    scheduler.idle = False
    answer = scheduler.updater.update_weights_from_disk(UpdateWeightFromDiskReqInput(model_path="m"))
    assert not answer.success and "not updated: requests are running or waiting" in answer.message
    assert scheduler.done == []
    kept = UpdateWeightFromDiskReqInput(model_path="m", flush_cache=False)  # the operator takes that on
    assert scheduler.updater.update_weights_from_disk(kept).success
    scheduler.idle = True
    assert scheduler.updater.update_weights_from_disk(UpdateWeightFromDiskReqInput(model_path="m")).success
    assert scheduler.done == ["updated", "updated"]


def test_tensors_that_cannot_be_read_are_an_answer(scheduler):
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

    scheduler.broken = RuntimeError("not a tensor")
    request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b"x" if NEWEST else "x"])
    answer = scheduler.updater.update_weights_from_tensor(request)
    assert (answer.success, answer.message) == (False, "the update failed: RuntimeError: not a tensor")

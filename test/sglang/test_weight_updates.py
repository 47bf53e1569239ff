"""Updates of the served weights beside training: SGLang's own handlers around a real model, its
dispatcher, and the scheduler's trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harli.managers.scheduler import control
from sglang_harli.managers.scheduler.co_serving import CoServing
from sglang_harli.managers.scheduler.training import co_trainer
from sglang_harli.protocol import internal
from sglang_harli.sglang_versions.current import weight_updates
from support.model_runner import NEWEST
from support.trainer.co_trainer_host import Host, Peer, spec, temporary_run_dir, until

sessions = pytest.mark.skipif(not NEWEST, reason="SGLang 0.5.16 has no weight-update sessions")
NORM = "model.norm.weight"


class Scheduler:
    """SGLang's handlers of weights around a runner, guarded as in ``HarliScheduler``; a trainer
    whose base is another model, so that what is served may change under it."""

    def __init__(self, run_dir: str, runner: Any) -> None:
        from sglang.srt.managers import io_struct
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
        from sglang.utils import TypeBasedDispatcher

        self.peer, self.host = Peer(run_dir), Host(run_dir)
        self.runner = runner
        worker = SimpleNamespace(model_runner=runner, weight_update_runners=lambda: [("target", runner)])
        worker.deserialize_own_rank = lambda tensors: tensors
        worker.update_weights_from_tensor = lambda request: runner.weight_updater.update_weights_from_tensor(
            named_tensors=request.serialized_named_tensors, load_format=None
        )
        common: dict[str, Any] = {
            "tp_worker": worker,
            "draft_worker": None,
            "memory_saver_adapter": None,
            "flush_cache": lambda **_: True,
            "is_fully_idle": lambda **_: True,
        }
        versions = SimpleNamespace(
            record_weight_version_change=lambda new_version: None, _engine_paused=False
        )
        common |= {"scheduler": versions} if NEWEST else {"tp_cpu_group": None}
        self.weight_updater = SchedulerWeightUpdaterManager(**common)
        handlers = {
            io_struct.UpdateWeightsFromTensorReqInput: self.weight_updater.update_weights_from_tensor,
            io_struct.UpdateWeightFromDiskReqInput: self.weight_updater.update_weights_from_disk,
            io_struct.UpdateWeightsFromDistributedReqInput: self.weight_updater.update_weights_from_distributed,
            io_struct.UpdateWeightsFromIPCReqInput: self.weight_updater.update_weights_from_ipc,
            io_struct.ResumeMemoryOccupationReqInput: self.weight_updater.resume_memory_occupation,
        }
        if NEWEST:
            handlers[io_struct.BeginWeightUpdateReqInput] = self.weight_updater.begin_weight_update
            handlers[io_struct.EndWeightUpdateReqInput] = self.weight_updater.end_weight_update
        self.dispatch = TypeBasedDispatcher(list(handlers.items()))
        surroundings = SimpleNamespace(
            device="cpu",
            server_args=runner.server_args,
            idle_sleeper=None,
            weight_updater=self.weight_updater,
        )
        serving = CoServing(surroundings, self.host.side, self.host.trainer)
        control.guard_weight_updates(
            self.dispatch, lambda: self.host.trainer.training, serving.weights_updated, set
        )
        until(self.host, self.peer, lambda: self.peer.of(internal.Hello))

    @property
    def told(self) -> internal.Hello:
        self.host.turn()
        self.peer.pump()
        return self.peer.of(internal.Hello)[-1]

    def start_run(self, attempt: int = 1) -> bool:
        """Whether the scheduler takes a run that the service starts now."""
        trainer = self.host.trainer
        self.peer.send(internal.StartRun(spec=spec(attempt), updates=trainer.updates))
        for _ in range(40):
            self.host.turn()
            self.host.link.wait(0.005)
            self.peer.pump()
        return trainer.run is not None

    def update(self, factor: float) -> Any:
        """The final norm's weight, multiplied."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        weight = dict(self.runner.model.named_parameters())[NORM]
        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
        request.serialized_named_tensors = [(NORM, weight.detach() * factor)]  # type: ignore[list-item]
        return self.dispatch(request)


@pytest.fixture
def scheduler(
    tmp_path: Path, sglang_runner: Callable[..., Any], tiny_model: Callable[..., str]
) -> Iterator[Scheduler]:
    for run_dir in temporary_run_dir(tmp_path):
        made = Scheduler(run_dir, sglang_runner(tiny_model()))
        yield made
        made.host.link.close()
        made.peer.socket.close()


def test_each_update_is_refused_in_its_own_form_while_a_job_trains(scheduler):
    assert scheduler.start_run()
    for request, output in weight_updates.ANSWERS.items():
        answer = scheduler.dispatch._mapping[request](None)
        assert isinstance(answer, output)
        assert (answer.success, answer.message) == (False, control.REFUSAL)
    assert scheduler.host.trainer.run is not None and scheduler.host.trainer.updates == 0


def test_sglang_has_no_other_request_that_updates_weights(scheduler):
    from sglang.srt.managers import io_struct

    names = {name for name in vars(io_struct) if name.endswith("ReqInput") and "Weight" in name}
    harmless = {
        "CheckWeightsReqInput",
        "DestroyWeightsUpdateGroupReqInput",
        "GetWeightsByNameReqInput",
        "InitWeightsSendGroupForRemoteInstanceReqInput",
        "InitWeightsUpdateGroupReqInput",
        "SendWeightsToRemoteInstanceReqInput",
        "UpdateWeightVersionReqInput",
    }
    assert names - harmless == {request.__name__ for request in weight_updates.ANSWERS}


@sessions
def test_no_run_starts_between_the_begin_and_the_end_of_an_update(scheduler):
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, EndWeightUpdateReqInput

    assert scheduler.dispatch(BeginWeightUpdateReqInput()).success
    assert scheduler.told.hold == co_trainer.UPDATING
    assert scheduler.update(2.0).success
    assert not scheduler.start_run(1)
    assert (scheduler.told.hold, scheduler.told.updates) == (co_trainer.UPDATING, 0)
    assert scheduler.dispatch(EndWeightUpdateReqInput()).success
    assert (scheduler.told.hold, scheduler.told.updates) == ("", 1)
    assert scheduler.start_run(2)
    begin = scheduler.dispatch(BeginWeightUpdateReqInput())
    assert (begin.success, begin.message) == (False, control.REFUSAL)
    assert not weight_updates.unfinished(scheduler.weight_updater)


@sessions
def test_an_update_that_sglang_refuses_holds_nothing(scheduler):
    from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

    assert not scheduler.dispatch(EndWeightUpdateReqInput()).success  # none was begun
    assert not scheduler.update(2.0).success
    assert scheduler.told.hold == "" and scheduler.start_run()


@pytest.mark.skipif(NEWEST, reason="on SGLang 0.5.23 it comes in a session")
def test_an_update_by_itself_is_one_and_ends_at_once(scheduler):
    assert scheduler.update(2.0).success
    assert (scheduler.told.hold, scheduler.told.updates) == ("", 1)
    assert scheduler.start_run()
